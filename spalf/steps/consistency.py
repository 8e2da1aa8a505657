"""The consistency step: do runs that differ only in their seed find the same features?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from spalf.checkpoint import sha256
from spalf.errors import UserError
from spalf.evaluation import pw_mcc
from spalf.interchange import LoadedSAE, load_sae
from spalf.interchange.saelens import WEIGHTS_FILE
from spalf.sae import StratifiedSAE
from spalf.steps.context import StepContext, environment, write_json

_WEIGHTS = ("model.safetensors", WEIGHTS_FILE)


def consistency(saes: Sequence[Path], out: Path, context: StepContext) -> None:
    """Compare the dictionaries of several SAEs, pair by pair, and write the result as JSON.

    Columns that are anchored start out equal in every run and are left out.

    Args:
        saes: directories of the SAEs: of a phase or a baseline, or SAELens folders.
        out: the file to write: ``pw_mcc``, the mean over pairs; ``pairs``, each of them;
            ``features``, columns compared of each SAE; and ``saes`` with the digests of their
            weights.
        context: device.

    Raises:
        UserError: fewer than two SAEs were given, one is damaged, they are of different widths,
            or one has no free column.
    """
    if len(saes) < 2:
        raise UserError("SAE", None, "give at least two, which differ in their seed")
    with context.nothing_to_lose():
        loaded = [load_sae(path, context.device) for path in saes]
        decoders = [sae.W_dec[_anchored(sae) :] for sae in loaded]
        for sae, decoder in zip(loaded, decoders, strict=True):
            if sae.d_model != loaded[0].d_model or not len(decoder):
                remedy = f"has {len(decoder)} free columns of width {sae.d_model}; others differ"
                raise UserError("SAE", str(sae.source), remedy)
        scores = [pw_mcc(first, second) for first, second in combinations(decoders, 2)]
    weights = [next(path / n for n in _WEIGHTS if (path / n).exists()) for path in saes]
    report = {
        "pw_mcc": sum(scores) / len(scores),
        "pairs": scores,
        "features": [len(decoder) for decoder in decoders],
        "saes": {str(path): sha256(path) for path in weights},
        "environment": environment(context),
    }
    write_json(out, json.loads(json.dumps(report)))


def _anchored(sae: LoadedSAE) -> int:
    return sae.coder.n_anchored if isinstance(sae.coder, StratifiedSAE) else 0
