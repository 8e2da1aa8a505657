"""One SAE at several sparsities: the frontier traced by scaling its thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from spalf.evaluation.downstream import DownstreamMeasurement
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
    measurement = ThresholdSweep(model, sae, factors)
    for batch in sequences:
        measurement.add(batch)
        if progress is not None:
            progress(batch.numel())
    return measurement.result()


class ThresholdSweep:
    """`threshold_sweep` batch by batch; what it has gathered can be saved in between.

    Args:
        model: the language model, patchable at the site.
        sae: the trained SAE.
        factors: multipliers of θ, in the order the rows are wanted.
    """

    def __init__(self, model: PatchableModel, sae: ScalableCoder, factors: Sequence[float]) -> None:
        scaled = {repr(factor): sae.scaled_thresholds(factor) for factor in factors}
        self._factors, self._measurement = factors, DownstreamMeasurement(model, scaled)

    def add(self, sequences: Tensor) -> None:
        """Take in one batch of tokens ``[n_seq, seq_len]``."""
        self._measurement.add(sequences)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered so far."""
        return self._measurement.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; going on is then bit-identical."""
        self._measurement.load_state_dict(state)

    def result(self) -> list[dict[str, float]]:
        """One row per factor, as `threshold_sweep` gives them.

        Raises:
            UserError: nothing was added.
        """
        measured = self._measurement.metrics()
        rows = []
        for factor in self._factors:
            metrics = measured[repr(factor)]
            row = {"factor": factor, "l0": metrics.l0, "ce_sae": metrics.ce_sae}
            row |= {"delta_ce": metrics.delta_ce, "explained_variance": metrics.explained_variance}
            rows.append(row)
        return rows
