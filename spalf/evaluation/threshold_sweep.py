"""One SAE at several sparsities: the frontier traced by scaling its thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from spalf.evaluation.downstream import evaluate_downstream
from spalf.evaluation.protocols import PatchableModel, Progress, ScalableCoder


def threshold_sweep(
    model: PatchableModel,
    sae: ScalableCoder,
    sequences: Iterable[Tensor],
    factors: Sequence[float],
    *,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """L0 against loss with every threshold θ multiplied by each factor, in one pass.

    Args:
        model: the language model, patchable at the site.
        sae: the trained SAE.
        sequences: batches of held-out tokens ``[n_seq, seq_len]``.
        factors: multipliers of θ, in the order the rows are wanted.
        progress: called with the number of tokens after each batch.

    Returns:
        One row per factor: ``factor``, ``l0``, ``ce_sae``, ``delta_ce``, ``explained_variance``.

    Raises:
        UserError: ``sequences`` is empty.
    """
    scaled = {repr(factor): sae.scaled_thresholds(factor) for factor in factors}
    measured = evaluate_downstream(model, scaled, sequences, progress=progress)
    rows = []
    for factor in factors:
        metrics = measured[repr(factor)]
        row = {"factor": factor, "l0": metrics.l0, "ce_sae": metrics.ce_sae}
        row |= {"delta_ce": metrics.delta_ce, "explained_variance": metrics.explained_variance}
        rows.append(row)
    return rows
