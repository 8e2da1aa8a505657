"""Baselines: the same activations, a rate chosen on tokens of their own, SAELens's format."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spalf.activations import ActivationStore
from spalf.baselines import hyperparameters, selection_activations
from spalf.baselines.recipes import Shape
from spalf.baselines.selection import measure, score
from spalf.checkpoint import read_checkpoint, read_metadata
from spalf.config import BaselinesConfig, RunConfig
from spalf.data import TokenSplits
from spalf.errors import Diverged, Interrupted, UserError
from spalf.interchange import SAELensConfig, SAELensSAE, read_saelens
from spalf.interchange.saelens import WEIGHTS_FILE
from spalf.steps.baseline import baseline
from spalf.steps.evaluate import evaluate
from spalf.training.phase import phase_one
from tests import helpers_planted as planted

sae_lens = pytest.importorskip("sae_lens")

METHODS = ["batchtopk", "topk", "jumprelu"]
LRS = (1e-3, 4e-3, 1.6e-2)


def config(steps: int = 60, **changes: Any) -> RunConfig:
    return planted.planted_config(steps, baselines={"lrs": LRS}, **changes)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write_calibration(config(), tmp_path_factory.mktemp("planted") / "calibration")


@pytest.fixture(scope="module")
def trained(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cell of each baseline."""
    folder = tmp_path_factory.mktemp("baselines")
    for method in METHODS:
        baseline(config(), method, calibration, folder / method, planted.context())
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_the_best_rate_is_kept_and_what_was_tried_is_written_down(
    trained: dict[str, Path], method: str
) -> None:
    metadata = read_checkpoint(trained[method]).metadata
    about = metadata["baseline"]
    assert metadata["method"] == method
    assert metadata["environment"]["sae-lens"] == sae_lens.__version__
    assert [rate["lr"] for rate in about["rates"]] == list(LRS)
    best = max(about["rates"], key=lambda rate: rate["matched_explained_variance"])
    assert about["lr"] == best["lr"]
    assert best["explained_variance"] > 0.5
    assert about["train_tokens"] == config().total_tokens
    assert about["hyperparameters"]["lr_decay_steps"] == 12
    assert "calibration split" in about["chosen_by"]


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_saelens_own_and_takes_raw_activations(
    trained: dict[str, Path], method: str
) -> None:
    """``norm_scale`` is folded into the weights: R² on raw activations is what training reached."""
    theirs, ours = sae_lens.SAE.load_from_disk(trained[method]), read_saelens(trained[method])
    x = planted.PlantedModel().activations(torch.arange(256).view(16, 16)).flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata["training_architecture"] == method
    assert measure(ours, [x])[1] > 0.5


def test_l0_is_what_was_asked_for(trained: dict[str, Path]) -> None:
    rates = {m: read_metadata(trained[m])["baseline"]["rates"] for m in METHODS}
    assert all(rate["l0"] <= config().L0_target for rate in rates["topk"])
    assert all(rate["threshold_factor"] == 1 for rate in rates["topk"])
    for rate in rates["batchtopk"]:
        assert rate["threshold_factor"] != 1


def test_every_rate_and_phase_one_see_the_same_batches(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Tensor]] = {}
    step = sae_lens.SAETrainer.step

    def watched(self: Any, batch: Tensor) -> Any:
        seen.setdefault(id(self), []).append(batch.clone())
        return step(self, batch)

    monkeypatch.setattr(sae_lens.SAETrainer, "step", watched)
    run = config(20, seed=3)
    calibration = planted.write_calibration(run, tmp_path / "calibration")
    baseline(run, "topk", calibration, tmp_path / "topk", planted.context())

    train = TokenSplits.open(calibration / "tokens").train
    store = ActivationStore(planted.PlantedModel(), train)
    sae = planted.trained_like(store.harvest(0, 64), run.F)
    expected = list(islice(phase_one(run, store, sae).batches(0), 20))
    assert len(seen) == len(LRS)
    for batches in seen.values():
        assert len(batches) == 20
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


def test_all_rates_start_from_the_weights_of_the_seed(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []
    init = sae_lens.SAETrainer.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        starts.append(self.sae.W_dec.detach().clone())

    monkeypatch.setattr(sae_lens.SAETrainer, "__init__", watched)
    before = torch.random.get_rng_state()
    for seed in (0, 1):
        run = config(10, seed=seed)
        made = planted.write_calibration(run, tmp_path / f"calibration{seed}")
        baseline(run, "topk", made, tmp_path / f"{seed}", planted.context())
    assert all(torch.equal(start, starts[0]) for start in starts[:3])
    assert all(torch.equal(start, starts[3]) for start in starts[3:])
    assert not torch.equal(starts[0], starts[3])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_takes_the_rate_and_tries_no_other(
    calibration: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    other, context = config(seed=1), planted.context()
    baseline(other, "topk", calibration, tmp_path / "out", context, trained["topk"])
    ours, theirs = (
        read_metadata(place)["baseline"] for place in (tmp_path / "out", trained["topk"])
    )
    assert (ours["lr"], ours["rates"]) == (theirs["lr"], theirs["rates"])
    assert ours["chosen_by"] == f"{theirs['chosen_by']}, with seed 0"
    alone = config(seed=1).model_copy(update={"baselines": BaselinesConfig(lrs=(ours["lr"],))})
    baseline(alone, "topk", calibration, tmp_path / "alone", context)
    weights = [load_file(tmp_path / name / WEIGHTS_FILE) for name in ("out", "alone")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [("batchtopk", {}, "baseline"), ("topk", {"L0_target": 5.0}, "L0_target")],
)
def test_the_rate_of_another_cell_is_refused(
    calibration: Path, trained: dict[str, Path], tmp_path: Path,
    method: str, changes: dict[str, Any], named: str,
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=rf"--rate-of.*{named} is .* there, .* here"):
        baseline(
            config(seed=1, **changes), method, calibration, tmp_path / "out", planted.context(),
            trained["topk"],
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_no_evaluation_token_is_read(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in training nor to choose the rate; the rates are compared where nothing trains."""
    splits = TokenSplits.open(calibration / "tokens")
    rows = {
        name: {tuple(row) for row in getattr(splits, name).sequences(0, count).tolist()}
        for name, count in planted.SEQUENCES.items()
    }
    context, seen = planted.context(), []
    activations = context.model.activations

    def watched(tokens: Tensor) -> Tensor:
        seen.extend(tuple(row) for row in tokens.tolist())
        return activations(tokens)

    monkeypatch.setattr(context.model, "activations", watched)
    baseline(config(), "batchtopk", calibration, tmp_path / "out", context)
    assert not rows["evaluation"] & set(seen)
    assert set(seen) <= rows["train"] | rows["calibration"]
    chosen = [row for row in seen if row in rows["calibration"]]
    assert 0 < len(chosen) <= planted.SEQUENCES["calibration"]


def test_selection_takes_the_end_of_its_split(calibration: Path) -> None:
    stream = TokenSplits.open(calibration / "tokens").calibration
    store = ActivationStore(planted.PlantedModel(), stream)
    chosen = torch.cat(selection_activations(store))
    per_sequence = stream.seq_len
    expected = store.harvest(stream.n_sequences - 3, 3)
    assert torch.equal(chosen[-3 * per_sequence :], expected)


def test_rates_are_compared_at_one_l0() -> None:
    """A dictionary of the axes: L0 falls as the common threshold rises, and so does R²."""
    x = torch.rand(512, 4, generator=torch.Generator().manual_seed(0))
    cfg = SAELensConfig("jumprelu", 4, 4, False, "none", None, False, {})
    tensors = {"W_enc": torch.eye(4), "W_dec": torch.eye(4)}
    tensors |= {"b_enc": torch.zeros(4), "b_dec": torch.zeros(4)}
    low, high = (
        score(SAELensSAE(cfg, {**tensors, "threshold": torch.full((4,), t)}), [x], 2.0)
        for t in (0.25, 0.75)
    )
    assert low.l0 == pytest.approx(3, abs=0.2)
    assert high.l0 == pytest.approx(1, abs=0.2)
    assert low.explained_variance > low.matched_explained_variance
    assert high.explained_variance < high.matched_explained_variance
    assert low.matched_explained_variance == pytest.approx(high.matched_explained_variance)
    assert low.threshold_factor == pytest.approx(3 * high.threshold_factor, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_i10_an_interrupted_baseline_goes_on_bit_for_bit(
    trained: dict[str, Path], calibration: Path, tmp_path: Path, method: str
) -> None:
    out, stops = tmp_path / method, 0
    while not (out / "metadata.json").exists():
        asked = iter([False] * (20 + 7 * stops))
        try:
            context = planted.context(lambda asked=asked: next(asked, True))
            baseline(config(), method, calibration, out, context)
        except Interrupted:
            stops += 1
    assert stops > 2
    weights = "sae_weights.safetensors"
    assert (out / weights).read_bytes() == (trained[method] / weights).read_bytes()
    here, there = read_metadata(out)["baseline"], read_metadata(trained[method])["baseline"]
    assert here == there


def test_a_finished_baseline_is_not_trained_again(
    trained: dict[str, Path], calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "topk"
    shutil.copytree(trained["topk"], out)
    written = (out / "metadata.json").stat().st_mtime_ns
    baseline(config(), "topk", calibration, out, planted.context())
    assert (out / "metadata.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="baseline"):
        baseline(config(), "batchtopk", calibration, out, planted.context())


def test_a_rate_that_diverges_is_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor hides one that does not: a comparison with NaN is false, whichever way round."""
    step = sae_lens.SAETrainer.step

    def spoiled(self: Any, batch: Tensor) -> Any:
        return step(self, batch * torch.nan if self.cfg.lr in bad else batch)

    monkeypatch.setattr(sae_lens.SAETrainer, "step", spoiled)
    run, bad = config(20), {LRS[0], LRS[2]}
    calibration = planted.write_calibration(run, tmp_path / "calibration")
    baseline(run, "topk", calibration, tmp_path / "one", planted.context())
    about = read_metadata(tmp_path / "one")["baseline"]
    assert about["lr"] == LRS[1]
    bad = set(LRS)
    with pytest.raises(Diverged, match="smaller baselines"):
        baseline(run, "topk", calibration, tmp_path / "none", planted.context())
    assert not (tmp_path / "none" / "metadata.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_reports_a_baseline_like_a_phase(
    trained: dict[str, Path], calibration: Path, tmp_path: Path, method: str
) -> None:
    unasked = {"absorption": False, "probing": False}  # the planted model has no tokenizer
    run = config(evaluate={"tokens": 2048, "sweep_tokens": 512, **unasked})
    report_path = tmp_path / "evaluation.json"
    evaluate(run, calibration, {"sae": trained[method]}, report_path, planted.context(), "planted")
    report = json.loads(report_path.read_text())
    assert report["final"] == "sae"
    assert report["cell"]["method"] == method
    assert report["cell"]["lr"] in LRS
    assert report["cell"]["hyperparameters"]["lr_tried"] == list(LRS)
    row = report["phases"]["sae"]
    assert row["explained_variance"] > 0.5
    assert row["train_tokens"] == run.total_tokens
    assert row["lambda_faith"] is None
    assert len(report["threshold_sweep"]) == (0 if method == "topk" else 7)


def test_hyperparameters_hold_the_target() -> None:
    shape = Shape(8, 64, 5.0, 100)
    assert hyperparameters("batchtopk", shape)["k"] == 5.0
    assert hyperparameters("topk", shape)["k"] == 5
    assert hyperparameters("jumprelu", shape)["target_l0"] == 5.0
    with pytest.raises(UserError, match="whole number"):
        hyperparameters("topk", Shape(8, 64, 5.5, 100))
    with pytest.raises(UserError, match="no such baseline"):
        hyperparameters("gated", shape)


def test_a_missing_extra_is_one_line(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError) as caught:
        baseline(config(), "topk", calibration, tmp_path / "out", planted.context())
    assert "pip install 'spalf[baselines]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_version_of_saelens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from spalf.baselines import require_saelens

    monkeypatch.setattr(sae_lens, "__version__", "5.0.0")
    with pytest.raises(UserError, match=r"5\.0\.0.*6\.54\.12"):
        require_saelens()
