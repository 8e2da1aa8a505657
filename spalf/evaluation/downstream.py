"""Sparsity, fidelity and downstream loss of SAEs on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spalf.errors import UserError
from spalf.evaluation.protocols import PatchableModel, Progress, SparseCoder

DENSE_DENSITY = 0.1
"""A feature that fires on more than this share of tokens counts as dense."""

_CHUNK_ELEMENTS = 2**22
"""Codes or logits worked on at a time: 16 MiB of float32, which a CPU's cache can hold."""
_GPU_CHUNK_ELEMENTS = 2**26
"""The same on a GPU, which has to be kept busy."""


@dataclass(frozen=True, eq=False)
class DownstreamMetrics:
    """Token-weighted means over the evaluation set; ``_se`` are standard errors over sequences.

    Cross-entropies and divergences are nats per token, over next-token positions. A standard
    error is ``None`` where there is a single sequence.

    Attributes:
        l0: mean number of active features per token.
        explained_variance: R² = 1 − E‖x−x̂‖²/E‖x−E x‖², with E x of the evaluation set itself.
        mse: E‖x−x̂‖², the squared norm (summed over ``d_model``).
        ce_clean: cross-entropy of the untouched model.
        ce_sae: cross-entropy with x̂ in place of x.
        ce_zero: cross-entropy with 0 in place of x.
        delta_ce: ``ce_sae − ce_clean``.
        ce_recovered: (ce_zero − ce_sae)/(ce_zero − ce_clean); ``None`` if zeroing costs nothing.
        kl: KL(p_clean ‖ p_sae).
        dead_fraction: share of features that never fire here.
        dense_fraction: share of features with density above 0.1.
        tokens: activations measured.
        density: share of tokens on which each feature fires, float64 ``[d_sae]``.
    """

    l0: float
    l0_se: float | None
    explained_variance: float
    mse: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    delta_ce: float
    delta_ce_se: float | None
    ce_recovered: float | None
    kl: float
    kl_se: float | None
    dead_fraction: float
    dense_fraction: float
    tokens: int
    density: Tensor

    def summary(self) -> dict[str, float | int | None]:
        """Every metric but the per-feature density, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "density"}


def evaluate_downstream(
    model: PatchableModel,
    saes: Mapping[str, SparseCoder],
    sequences: Iterable[Tensor],
    *,
    progress: Progress | None = None,
) -> dict[str, DownstreamMetrics]:
    """Measure several SAEs of one site in one pass over the evaluation set.

    Costs 2 + ``len(saes)`` forward passes: clean (which also yields the activations), zeroed,
    and one per SAE.

    Args:
        model: the language model, patchable at the site.
        saes: by name.
        sequences: batches of tokens ``[n_seq, seq_len]``, int64, ``seq_len`` ≥ 2.
        progress: called with the number of tokens after each batch.

    Raises:
        UserError: ``sequences`` is empty.
    """
    measurement = DownstreamMeasurement(model, saes)
    for batch in sequences:
        measurement.add(batch)
        if progress is not None:
            progress(batch.numel())
    return measurement.metrics()


class DownstreamMeasurement:
    """`evaluate_downstream` batch by batch; what it has gathered can be saved in between.

    Args:
        model: the language model, patchable at the site.
        saes: by name.
    """

    def __init__(self, model: PatchableModel, saes: Mapping[str, SparseCoder]) -> None:
        self._model, self._shared = model, _Shared()
        self._tallies = {name: _Tally(sae) for name, sae in saes.items()}

    @torch.no_grad()
    def add(self, sequences: Tensor) -> None:
        """Take in one batch of tokens ``[n_seq, seq_len]``, int64, ``seq_len`` ≥ 2."""
        tokens = sequences.to(self._model.device)
        log_p, x = _clean_pass(self._model, tokens)
        zeroed = _log_probabilities(self._model.patched_logits(tokens, torch.zeros_like))
        self._shared.add(x, _ce(log_p, tokens), _ce(zeroed, tokens))
        for tally in self._tallies.values():
            patch = _put(tally.reconstruct(x))
            log_q = _log_probabilities(self._model.patched_logits(tokens, patch))
            tally.ce.append(_ce(log_q, tokens))
            tally.kl.append(_kl(log_p, log_q))

    def metrics(self) -> dict[str, DownstreamMetrics]:
        """The metrics of each SAE on what was added.

        Raises:
            UserError: nothing was.
        """
        if not self._shared.tokens:
            raise UserError("evaluate.tokens", None, "the evaluation split is empty; use more text")
        return {name: _metrics(self._shared, tally) for name, tally in self._tallies.items()}

    def result(self) -> dict[str, dict[str, float | int | None]]:
        """The summary of each SAE's metrics."""
        return {name: metrics.summary() for name, metrics in self.metrics().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered so far; empty before the first batch."""
        if not self._shared.tokens:
            return {}
        state = {f"shared.{name}": value for name, value in self._shared.state_dict().items()}
        for index, tally in enumerate(self._tallies.values()):
            state |= {f"{index}.{name}": value for name, value in tally.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; going on is then bit-identical."""
        if not state:
            return
        device = self._model.device
        self._shared.load_state_dict(_part(state, "shared", device))
        for index, tally in enumerate(self._tallies.values()):
            tally.load_state_dict(_part(state, str(index), device))


def _part(state: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): v.to(device) for k, v in state.items() if k.startswith(start)}


def _clean_pass(model: PatchableModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Clean log-probabilities and the site's activations from a single forward pass."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    logits = model.patched_logits(tokens, keep)
    return _log_probabilities(logits), seen[0]


def _put(x_hat: Tensor) -> Callable[[Tensor], Tensor]:
    """A patch that puts ``x_hat`` in the place of whatever is there."""
    return lambda _: x_hat


class _Shared:
    """What does not depend on the SAE: the spread of the activations, clean and zeroed CE."""

    LISTS = ("ce_clean", "ce_zero", "positions")

    def __init__(self) -> None:
        self.tokens = 0
        self.mean: Tensor | float = 0.0
        self.scatter = 0.0
        self.ce_clean: list[Tensor] = []
        self.ce_zero: list[Tensor] = []
        self.positions: list[Tensor] = []

    def add(self, x: Tensor, ce_clean: Tensor, ce_zero: Tensor) -> None:
        """Take in one batch: ``x [n_seq, seq_len, d_model]`` and CE sums ``[n_seq]``."""
        self.ce_clean.append(ce_clean)
        self.ce_zero.append(ce_zero)
        self.positions.append(torch.full_like(ce_clean, x.shape[1] - 1))
        flat = x.flatten(0, 1).to(torch.float64)
        mean = flat.mean(dim=0)
        shift, count = mean - self.mean, flat.shape[0]
        total = self.tokens + count
        between = float(shift.square().sum()) * self.tokens * count / total
        self.scatter += float((flat - mean).square().sum()) + between
        self.mean = self.mean + shift * (count / total)
        self.tokens = total

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums; one tensor each."""
        return {
            "tokens": torch.tensor(self.tokens),
            "mean": torch.as_tensor(self.mean),
            "scatter": torch.tensor(self.scatter, dtype=torch.float64),
            **{name: torch.cat(getattr(self, name)) for name in self.LISTS},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.tokens, self.scatter = int(state["tokens"]), float(state["scatter"])
        self.mean = state["mean"]
        for name in self.LISTS:
            setattr(self, name, [state[name]])


class _Tally:
    """Running sums of one SAE; the lists hold one float64 sum per sequence."""

    LISTS = ("l0", "seq_len", "ce", "kl")

    def __init__(self, sae: SparseCoder) -> None:
        self.sae = sae
        d_sae = sae.W_dec.shape[0]
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=sae.W_dec.device)
        self.squared_error = 0.0
        self.l0: list[Tensor] = []
        self.seq_len: list[Tensor] = []
        self.ce: list[Tensor] = []
        self.kl: list[Tensor] = []

    def reconstruct(self, x: Tensor) -> Tensor:
        """x̂ for ``x [n_seq, seq_len, d_model]``, recording sparsity and squared error."""
        flat = x.flatten(0, 1)
        pieces, active = [], []
        for rows in flat.split(max(1, _at_a_time(flat) // self.fired.shape[0])):
            z = self.sae.encode(rows)
            gate = (z != 0).float()  # summing floats is many times faster than summing bools
            self.fired += gate.sum(dim=0).to(torch.int64)
            active.append(gate.sum(dim=1))
            pieces.append(self.sae.decode(z).to(x.dtype))
        x_hat = torch.cat(pieces)
        self.squared_error += float((flat - x_hat).to(torch.float64).square().sum())
        l0 = torch.cat(active).view(x.shape[:2]).sum(dim=1).to(torch.float64)
        self.l0.append(l0)
        self.seq_len.append(torch.full_like(l0, x.shape[1]))
        return x_hat.view_as(x)

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums; one tensor each."""
        return {
            "fired": self.fired,
            "squared_error": torch.tensor(self.squared_error, dtype=torch.float64),
            **{name: torch.cat(getattr(self, name)) for name in self.LISTS},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.fired, self.squared_error = state["fired"], float(state["squared_error"])
        for name in self.LISTS:
            setattr(self, name, [state[name]])


def _log_probabilities(logits: Tensor) -> Tensor:
    """Float32 ``[n_seq, seq_len, d_vocab]``, worked out a few sequences at a time."""
    return torch.cat([some.float().log_softmax(-1) for some in logits.split(_sequences(logits))])


def _sequences(logits: Tensor) -> int:
    """How many sequences to work on at a time."""
    return max(1, _at_a_time(logits) // max(1, logits[0].numel()))


def _at_a_time(x: Tensor) -> int:
    """How many codes or logits to work on at a time where ``x`` is."""
    return _GPU_CHUNK_ELEMENTS if x.is_cuda else _CHUNK_ELEMENTS


def _ce(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Summed next-token cross-entropy of each sequence, float64 ``[n_seq]``."""
    right = log_p[:, :-1].gather(2, tokens[:, 1:, None])
    return -right.to(torch.float64).sum(dim=(1, 2))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Summed KL(p ‖ q) over next-token positions, float64 ``[n_seq]``."""
    size = _sequences(log_p)
    divergences = [
        (lp.exp() * (lp - lq)).sum(dim=-1)
        for lp, lq in zip(log_p.split(size), log_q.split(size), strict=True)
    ]
    return torch.cat(divergences)[:, :-1].to(torch.float64).sum(dim=1)


def _mean_and_se(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Ratio estimate Σs/Σn and its standard error over sequences (``None`` for one)."""
    mean = sums.sum() / counts.sum()
    n = sums.shape[0]
    if n < 2:
        return float(mean), None
    spread = (sums - counts * mean).square().sum() * (n / (n - 1))
    return float(mean), float(spread.sqrt() / counts.sum())


def _metrics(shared: _Shared, tally: _Tally) -> DownstreamMetrics:
    positions = torch.cat(shared.positions)
    clean, zero, patched = (torch.cat(c) for c in (shared.ce_clean, shared.ce_zero, tally.ce))
    ce_clean, ce_zero = (_mean_and_se(sums, positions)[0] for sums in (clean, zero))
    delta_ce, delta_ce_se = _mean_and_se(patched - clean, positions)
    kl, kl_se = _mean_and_se(torch.cat(tally.kl), positions)
    l0, l0_se = _mean_and_se(torch.cat(tally.l0), torch.cat(tally.seq_len))
    density = tally.fired.to(torch.float64) / shared.tokens
    gap = ce_zero - ce_clean
    return DownstreamMetrics(
        l0=l0,
        l0_se=l0_se,
        explained_variance=1 - tally.squared_error / shared.scatter if shared.scatter else math.nan,
        mse=tally.squared_error / shared.tokens,
        ce_clean=ce_clean,
        ce_sae=ce_clean + delta_ce,
        ce_zero=ce_zero,
        delta_ce=delta_ce,
        delta_ce_se=delta_ce_se,
        ce_recovered=1 - delta_ce / gap if gap else None,
        kl=kl,
        kl_se=kl_se,
        dead_fraction=float((density == 0).double().mean()),
        dense_fraction=float((density > DENSE_DENSITY).double().mean()),
        tokens=shared.tokens,
        density=density,
    )
