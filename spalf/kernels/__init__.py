"""Fused operations on SAE codes: a PyTorch reference and, on a GPU, Triton kernels."""

from spalf.kernels.dispatch import Choice, Implementation, choose, jumprelu
from spalf.kernels.reference import Surrogate

__all__ = ["Choice", "Implementation", "Surrogate", "choose", "jumprelu"]
