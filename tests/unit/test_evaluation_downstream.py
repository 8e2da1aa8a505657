from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from spalf.errors import UserError
from spalf.evaluation import (
    DownstreamMeasurement,
    DownstreamMetrics,
    ThresholdSweep,
    evaluate_downstream,
    threshold_sweep,
)

D_MODEL, D_VOCAB, SEQ_LEN = 6, 11, 9


class ToyModel:
    """Embedding, a causal running mean (the site), a nonlinear layer, unembedding."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.randn(D_VOCAB, D_MODEL, generator=generator)
        self.mix = torch.randn(D_MODEL, D_MODEL, generator=generator)
        self.unembed = torch.randn(D_MODEL, D_VOCAB, generator=generator)
        self.forwards = 0

    def activations(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(1, tokens.shape[1] + 1)[None, :, None]
        return self.embed[tokens].cumsum(1) / steps + 1.0

    def patched_logits(self, tokens: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
        self.forwards += 1
        x = patch(self.activations(tokens))
        return (x + (x @ self.mix).tanh()) @ self.unembed


@dataclass
class SignedSAE:
    """x = Σ relu(±x_i): an exact code of width 2·d_model, with knobs to spoil it."""

    threshold: float = 0.0
    b_dec: float = 0.0
    gain: float = 1.0

    @property
    def W_dec(self) -> Tensor:
        eye = torch.eye(D_MODEL)
        return self.gain * torch.cat([eye, -eye])

    def encode(self, x: Tensor) -> Tensor:
        pre = torch.cat([x, -x], dim=1)
        return pre * (pre > self.threshold)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W_dec + self.b_dec

    def scaled_thresholds(self, factor: float) -> SignedSAE:
        return replace(self, threshold=self.threshold * factor)


PERFECT, ZERO = SignedSAE(), SignedSAE(threshold=math.inf)


def _batches(n_batches: int = 3, n_seq: int = 4, seq_len: int = SEQ_LEN) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(0, D_VOCAB, (n_seq, seq_len), generator=generator) for _ in range(n_batches)
    ]


def _measure(sae: SignedSAE, batches: list[Tensor] | None = None) -> DownstreamMetrics:
    return evaluate_downstream(ToyModel(), {"it": sae}, batches or _batches())["it"]


def test_i8_perfect_sae_changes_nothing() -> None:
    metrics = _measure(PERFECT)
    assert metrics.delta_ce == metrics.kl == metrics.mse == metrics.delta_ce_se == 0
    assert metrics.explained_variance == 1
    assert metrics.ce_recovered == 1
    assert metrics.ce_sae == metrics.ce_clean != metrics.ce_zero
    assert metrics.l0 == D_MODEL and metrics.l0_se == 0


def test_zero_sae_is_zero_ablation() -> None:
    metrics = _measure(ZERO)
    assert metrics.ce_sae == pytest.approx(metrics.ce_zero)
    assert metrics.ce_recovered == pytest.approx(0.0, abs=1e-9)
    assert metrics.l0 == 0 and metrics.dead_fraction == 1 and metrics.dense_fraction == 0
    x = torch.cat([ToyModel().activations(b).flatten(0, 1) for b in _batches()])
    assert metrics.mse == pytest.approx(float(x.square().sum(1).mean()))
    assert metrics.explained_variance < 0  # 0 is a worse guess than the mean


def test_mean_predictor_explains_nothing() -> None:
    x = torch.cat([ToyModel().activations(b).flatten(0, 1) for b in _batches()])

    class Mean(SignedSAE):
        def decode(self, z: Tensor) -> Tensor:
            return x.mean(0).expand(z.shape[0], -1)

    assert _measure(Mean(threshold=math.inf)).explained_variance == pytest.approx(0, abs=1e-6)


def test_known_explained_variance_and_mse() -> None:
    """x̂ = x + c has E‖x−x̂‖² = d·c²."""
    metrics = _measure(SignedSAE(b_dec=0.5))
    x = torch.cat([ToyModel().activations(b).flatten(0, 1) for b in _batches()]).double()
    variance = float((x - x.mean(0)).square().sum(1).mean())
    assert metrics.mse == pytest.approx(D_MODEL * 0.25, rel=1e-5)
    assert metrics.explained_variance == pytest.approx(1 - D_MODEL * 0.25 / variance, rel=1e-5)


def test_losses_against_plain_formulas() -> None:
    sae, model, tokens = SignedSAE(gain=0.6), ToyModel(), torch.cat(_batches())
    metrics = _measure(sae)

    def log_p(patch: Callable[[Tensor], Tensor]) -> Tensor:
        return model.patched_logits(tokens, patch)[:, :-1].double().log_softmax(-1)

    def ce(logs: Tensor) -> Tensor:
        return -logs.gather(2, tokens[:, 1:, None])[..., 0]

    clean = log_p(lambda x: x)
    patched = log_p(lambda x: sae.decode(sae.encode(x.flatten(0, 1))).view_as(x))
    zeroed = log_p(torch.zeros_like)
    kl = (clean.exp() * (clean - patched)).sum(-1)
    assert metrics.ce_clean == pytest.approx(float(ce(clean).mean()), rel=1e-5)
    assert metrics.ce_sae == pytest.approx(float(ce(patched).mean()), rel=1e-5)
    assert metrics.ce_zero == pytest.approx(float(ce(zeroed).mean()), rel=1e-5)
    assert metrics.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    per_sequence = kl.mean(1)
    assert metrics.kl_se == pytest.approx(float(per_sequence.std() / 12**0.5), rel=1e-3)
    difference = (ce(patched) - ce(clean)).mean(1)
    assert metrics.delta_ce_se == pytest.approx(float(difference.std() / 12**0.5), rel=1e-3)
    recovered = (metrics.ce_zero - metrics.ce_sae) / (metrics.ce_zero - metrics.ce_clean)
    assert metrics.ce_recovered == pytest.approx(recovered)


def test_sparsity_counts() -> None:
    metrics = _measure(SignedSAE(threshold=1.0))
    tokens = torch.cat(_batches())
    z = SignedSAE(threshold=1.0).encode(ToyModel().activations(tokens).flatten(0, 1))
    fires = (z > 0).double()
    torch.testing.assert_close(metrics.density, fires.mean(0))
    assert metrics.l0 == pytest.approx(float(fires.sum(1).mean()))
    per_sequence = fires.sum(1).view(12, SEQ_LEN).mean(1)
    assert metrics.l0_se == pytest.approx(float(per_sequence.std() / 12**0.5))
    assert metrics.dead_fraction == pytest.approx(float((fires.sum(0) == 0).double().mean()))
    assert metrics.dense_fraction == pytest.approx(float((fires.mean(0) > 0.1).double().mean()))
    assert metrics.tokens == 12 * SEQ_LEN


def test_metrics_do_not_depend_on_the_batching() -> None:
    tokens = torch.cat(_batches())
    one, many = (_measure(SignedSAE(gain=0.6), list(tokens.split(n))) for n in (12, 5))
    for name, value in one.summary().items():
        assert many.summary()[name] == pytest.approx(value, rel=1e-5), name


def test_means_weight_tokens_not_sequences() -> None:
    """A long batch and a short one: the mean is over tokens."""
    long, short = _batches(1, 2, 20)[0], _batches(1, 2, 4)[0]
    sae = SignedSAE(threshold=1.0)
    apart = [_measure(sae, [batch]) for batch in (long, short)]
    both = _measure(sae, [long, short])
    assert both.l0 == pytest.approx((40 * apart[0].l0 + 8 * apart[1].l0) / 48)
    assert both.ce_clean == pytest.approx((38 * apart[0].ce_clean + 6 * apart[1].ce_clean) / 44)


def test_several_saes_share_one_pass() -> None:
    model, seen = ToyModel(), []
    saes = {"phase1": SignedSAE(gain=0.6), "phase2": SignedSAE(gain=0.9)}
    both = evaluate_downstream(model, saes, iter(_batches()), progress=seen.append)
    assert model.forwards == 3 * (2 + len(saes))
    assert seen == [4 * SEQ_LEN] * 3
    assert both["phase2"].kl < both["phase1"].kl
    for name, sae in saes.items():
        assert both[name].summary() == _measure(sae).summary()


def test_chunking_of_codes_and_logits_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _measure(SignedSAE(gain=0.6)).summary()
    monkeypatch.setattr("spalf.evaluation.downstream._CHUNK_ELEMENTS", 1)
    for name, value in _measure(SignedSAE(gain=0.6)).summary().items():
        assert value == pytest.approx(whole[name], rel=1e-6), name


def test_zeroing_that_costs_nothing_recovers_nothing_definable() -> None:
    class Deaf(ToyModel):
        def patched_logits(self, tokens: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
            patch(self.activations(tokens))
            return torch.zeros(*tokens.shape, D_VOCAB)

    metrics = evaluate_downstream(Deaf(), {"it": PERFECT}, _batches())["it"]
    assert metrics.ce_recovered is None
    assert metrics.ce_clean == pytest.approx(math.log(D_VOCAB))


def test_summary_is_json_without_the_density() -> None:
    summary = _measure(PERFECT).summary()
    assert "density" not in summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_one_sequence_has_means_but_no_standard_errors() -> None:
    metrics = _measure(SignedSAE(gain=0.6), _batches(1, 1))
    assert metrics.l0_se is metrics.kl_se is metrics.delta_ce_se is None
    assert metrics.kl > 0


def test_no_sequences_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"evaluate\.tokens"):
        evaluate_downstream(ToyModel(), {"it": PERFECT}, [])


def test_threshold_sweep_trades_sparsity_for_loss() -> None:
    sae = SignedSAE(threshold=0.5)
    factors = (0.0, 1.0, 2.0, 100.0)
    rows = threshold_sweep(ToyModel(), sae, _batches(), factors)
    assert [row["factor"] for row in rows] == list(factors)
    l0 = [row["l0"] for row in rows]
    assert l0 == sorted(l0, reverse=True) and l0[0] > l0[-1] == 0
    assert rows[0]["delta_ce"] == 0 and rows[0]["explained_variance"] == 1
    plain = _measure(sae)
    expected = {"factor": 1.0, "l0": plain.l0, "ce_sae": plain.ce_sae}
    expected |= {"delta_ce": plain.delta_ce, "explained_variance": plain.explained_variance}
    assert rows[1] == expected


@pytest.mark.parametrize("left_after", range(5))
def test_i10_a_measurement_left_and_taken_up_is_bit_identical(left_after: int) -> None:
    saes = {"phase1": SignedSAE(gain=0.6), "phase2": SignedSAE(gain=0.9, threshold=0.3)}
    batches = _batches(4)

    def started(kind: str) -> DownstreamMeasurement | ThresholdSweep:
        if kind == "sweep":
            return ThresholdSweep(ToyModel(), saes["phase2"], (0.5, 1.0, 2.0))
        return DownstreamMeasurement(ToyModel(), saes)

    for kind in ("downstream", "sweep"):
        whole, first, second = started(kind), started(kind), started(kind)
        for batch in batches:
            whole.add(batch)
        for batch in batches[:left_after]:
            first.add(batch)
        second.load_state_dict(first.state_dict())
        for batch in batches[left_after:]:
            second.add(batch)
        assert second.result() == whole.result()
        assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())
