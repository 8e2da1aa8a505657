"""The stratified JumpReLU sparse autoencoder and its initialisation."""

from spalf.sae.init import InitReport, anchor_directions, initialise
from spalf.sae.rows import ParameterRows
from spalf.sae.stratified import SAEOutput, StratifiedSAE

__all__ = [
    "InitReport",
    "ParameterRows",
    "SAEOutput",
    "StratifiedSAE",
    "anchor_directions",
    "initialise",
]
