"""One self-contained page per SAE: what its features fire on, promote, and lie near to."""

from spalf.dashboard.collect import Collector, Contexts, FeatureStatistics
from spalf.dashboard.directions import TokenEffects, anchor_drift, nearest_features, token_effects
from spalf.dashboard.overview import OverviewInputs, overview
from spalf.dashboard.page import FeatureData, build_page, write_page
from spalf.dashboard.strings import token_strings

__all__ = [
    "Collector",
    "Contexts",
    "FeatureData",
    "FeatureStatistics",
    "OverviewInputs",
    "TokenEffects",
    "anchor_drift",
    "build_page",
    "nearest_features",
    "overview",
    "token_effects",
    "token_strings",
    "write_page",
]
