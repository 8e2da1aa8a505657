"""Second-order statistics of the activations, and the linear map that evens them out (M1, M2)."""

from spalf.whitening.covariance import Moments, RunningCovariance, SplitHalfCovariance
from spalf.whitening.soft_zca import SoftZCA

__all__ = ["Moments", "RunningCovariance", "SoftZCA", "SplitHalfCovariance"]
