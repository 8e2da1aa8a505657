"""Fused operations on SAE codes: a PyTorch reference and, on a GPU, Triton kernels."""

from spalf.kernels.autoencode import (
    Autoencoded,
    Meanwhile,
    Parameters,
    Plan,
    PreActivations,
    Precision,
    autoencode,
    choose_lists,
    list_capacity,
    strongest_features,
)
from spalf.kernels.dispatch import Choice, Implementation, choose, jumprelu
from spalf.kernels.errors import squared_errors
from spalf.kernels.reference import Surrogate

__all__ = [
    "Autoencoded",
    "Choice",
    "Implementation",
    "Meanwhile",
    "Parameters",
    "Plan",
    "PreActivations",
    "Precision",
    "Surrogate",
    "autoencode",
    "choose",
    "choose_lists",
    "jumprelu",
    "list_capacity",
    "squared_errors",
    "strongest_features",
]
