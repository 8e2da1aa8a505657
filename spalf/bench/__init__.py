"""Measurements of speed and memory, side by side with SAELens (``make bench``)."""
