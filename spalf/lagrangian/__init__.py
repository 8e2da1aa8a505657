"""The augmented Lagrangian: one smooth scalar to minimise (M7, M10)."""

from spalf.lagrangian.augmented import augmented_lagrangian, penalty, psi
from spalf.lagrangian.objective import sparsity_objective

__all__ = ["augmented_lagrangian", "penalty", "psi", "sparsity_objective"]
