"""The three constraints as dimensionless violations; g ≤ 0 is feasible (M8, M16)."""

from spalf.constraints.drift import drift_violation
from spalf.constraints.faithfulness import blended_error, faithfulness_violation
from spalf.constraints.metric import fisher_factor
from spalf.constraints.orthogonality import (
    coactive_cosine_squared,
    orthogonality_violation,
)
from spalf.constraints.state import CONSTRAINTS, Violations

__all__ = [
    "CONSTRAINTS",
    "Violations",
    "blended_error",
    "coactive_cosine_squared",
    "drift_violation",
    "faithfulness_violation",
    "fisher_factor",
    "orthogonality_violation",
]
