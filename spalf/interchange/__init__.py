"""SAEs in the formats of other tools, and ours for use from Python."""

from spalf.interchange.load import LoadedSAE, load_sae, patched
from spalf.interchange.saelens import SAELensConfig, SAELensSAE, is_saelens_folder, read_saelens

__all__ = [
    "LoadedSAE",
    "SAELensConfig",
    "SAELensSAE",
    "is_saelens_folder",
    "load_sae",
    "patched",
    "read_saelens",
]
