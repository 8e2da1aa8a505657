"""The seven structural constants of the method (docs/method.md, "Structural constants").

They are part of the method, not knobs: the defaults are meant to serve every model. They can be
set from a configuration only so that their influence can be measured.
"""

from __future__ import annotations

from pydantic import Field

from spalf.config.base import Frozen


class StructuralConstants(Frozen):
    """Dimensionless constants shared by every run.

    Attributes:
        delta_cov: split-half error ‖Σ_a − Σ_b‖_F/‖Σ‖_F at which calibration stops (M1).
        delta_rank: share of the covariance trace that the whitener may leave out (M2).
        kappa: condition number the soft-ZCA ridge α = λ_k/κ allows (M2).
        c_eps: surrogate bandwidth in interquartile ranges, ε_j = c_ε·IQR_j (M6).
        c_ortho: tolerated mean cos² of co-active columns, in units of 1/d (M8).
        delta_drift: tolerated relative drift of the anchored columns (M8).
        c_eta: scale of the CAPU penalty coefficients (M13).
    """

    delta_cov: float = Field(default=0.02, gt=0, lt=1)
    delta_rank: float = Field(default=0.01, gt=0, lt=1)
    kappa: float = Field(default=100.0, ge=1)
    c_eps: float = Field(default=0.4, gt=0)
    c_ortho: float = Field(default=3.0, gt=0)
    delta_drift: float = Field(default=0.1, gt=0)
    c_eta: float = Field(default=1.0, gt=0)
