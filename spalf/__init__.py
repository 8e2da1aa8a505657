"""Sparse autoencoders trained by constrained optimisation: give an L0, get that L0."""
