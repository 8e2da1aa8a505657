"""What ``spalf export --format saelens`` writes, in SAELens itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from spalf import LoadedSAE, load_sae
from spalf.cli.interchange import import_
from spalf.config import RunConfig
from spalf.evaluation import evaluate_downstream
from spalf.interchange.export import export
from spalf.models import LanguageModel, load_model
from spalf.report.aggregate import aggregate
from spalf.steps.context import StepContext
from spalf.steps.evaluate import evaluate

sae_lens = pytest.importorskip("sae_lens", reason="install spalf[baselines]")

HOOK_POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def ours(demo_run: Path) -> LoadedSAE:
    return load_sae(demo_run / "phase2")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("spalf/demo-2l", HOOK_POINT, backend="transformer_lens", device="cpu")


@pytest.fixture(scope="module")
def theirs(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("exported") / "saelens"
    export(demo_run / "phase2", out, "saelens")
    return sae_lens.SAE.load_from_disk(out)


@torch.no_grad()
def test_encode_decode_and_l0_are_ours(
    ours: LoadedSAE, theirs: Any, model: LanguageModel, demo_tokens: torch.Tensor
) -> None:
    assert type(theirs).__name__ == "JumpReLUSAE"
    x = model.activations(demo_tokens)
    z, their_z = ours.encode(x), theirs.encode(x)
    assert z.count_nonzero() > 10_000
    # A pre-activation within rounding of its threshold may fall on either side.
    flipped = (z > 0) != (their_z > 0)
    assert flipped.sum() <= 2
    torch.testing.assert_close(their_z[~flipped], z[~flipped], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.decode(z), ours.decode(z), atol=1e-4, rtol=1e-4)
    whole = ~flipped.any(dim=-1)
    torch.testing.assert_close(theirs(x)[whole], ours.reconstruct(x)[whole], atol=1e-4, rtol=1e-4)


def test_metadata_says_where_it_belongs(theirs: Any) -> None:
    metadata = theirs.cfg.metadata
    assert metadata.hook_name == HOOK_POINT
    assert metadata.model_name == "spalf/demo-2l"
    assert metadata.context_size == 64
    assert metadata.prepend_bos is False
    assert theirs.cfg.d_in == 64 and theirs.cfg.d_sae == 96


def test_unit_norm_export_reconstructs_the_same(
    demo_run: Path,
    tmp_path: Path,
    ours: LoadedSAE,
    model: LanguageModel,
    demo_tokens: torch.Tensor,
) -> None:
    export(demo_run / "phase2", tmp_path / "unit", "saelens", unit_norm=True)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "unit")
    x = model.activations(demo_tokens[:8])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours.reconstruct(x), atol=1e-4, rtol=1e-4)
        norms = theirs.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(96))


def test_a_bfloat16_copy_is_close(
    demo_run: Path, tmp_path: Path, model: LanguageModel, demo_tokens: torch.Tensor
) -> None:
    export(demo_run / "phase2", tmp_path / "sae", "saelens")
    exact = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    rounded = sae_lens.SAE.load_from_disk(tmp_path / "sae", dtype="bfloat16")
    x = model.activations(demo_tokens[:8])
    with torch.no_grad():
        error = (rounded(x).float() - exact(x)).square().sum() / (exact(x) - x).square().sum()
    assert error < 0.05


def test_our_reader_of_saelens_reads_it_back(
    demo_run: Path,
    tmp_path: Path,
    theirs: Any,
    model: LanguageModel,
    demo_tokens: torch.Tensor,
) -> None:
    export(demo_run / "phase2", tmp_path / "sae", "saelens")
    again = load_sae(tmp_path / "sae")
    assert (again.model_name, again.hook_point) == ("spalf/demo-2l", HOOK_POINT)
    x = model.activations(demo_tokens[:8])
    with torch.no_grad():
        torch.testing.assert_close(again.reconstruct(x), theirs(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.W_dec, theirs.W_dec)


def their_evaluation(sae: Any, model: LanguageModel, tokens: torch.Tensor) -> dict[str, Any]:
    """What SAELens's own evaluation measures on these sequences, and on all of them."""
    from datasets import Dataset
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    bridge = model._model  # type: ignore[attr-defined]
    count, width = tokens.shape
    store = ActivationsStore.from_sae(
        bridge,
        sae,
        Dataset.from_dict({"tokens": tokens.tolist()}),
        context_size=width,
        store_batch_size_prompts=8,
        total_tokens=count,
    )
    batches = count // 8
    config = EvalConfig(
        batch_size_prompts=8,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    measured, _ = run_evals(
        sae, store, bridge, ActivationScaler(), config, exclude_special_tokens=False
    )
    return {name: value for part in measured.values() for name, value in part.items()}


def assert_same_figures(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    assert theirs["l0"] == pytest.approx(ours["l0"], abs=1e-3)
    assert theirs["explained_variance"] == pytest.approx(ours["explained_variance"], abs=1e-4)
    assert theirs["mse"] == pytest.approx(ours["mse"], rel=1e-4)
    assert theirs["ce_loss_without_sae"] == pytest.approx(ours["ce_clean"], abs=1e-4)
    assert theirs["ce_loss_with_sae"] == pytest.approx(ours["ce_sae"], abs=1e-4)
    assert theirs["ce_loss_with_ablation"] == pytest.approx(ours["ce_zero"], abs=1e-4)
    assert theirs["ce_loss_score"] == pytest.approx(ours["ce_recovered"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_their_evaluation_measures_what_ours_does(
    ours: LoadedSAE, theirs: Any, model: LanguageModel, demo_tokens: torch.Tensor
) -> None:
    expected = evaluate_downstream(model, {"sae": ours.coder}, [demo_tokens])["sae"]
    assert_same_figures(their_evaluation(theirs, model, demo_tokens), asdict(expected))


TRAINED = {
    "topk": {"k": 8},
    "batchtopk": {"k": 8, "topk_threshold_lr": 0.2},
    "matryoshka_batchtopk": {"k": 8, "topk_threshold_lr": 0.2, "matryoshka_widths": [24, 96]},
    "jumprelu": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 8.0},
}
"""Architectures that SAELens trains, with settings; it saves all but the first as jumprelu."""


def train_theirs(architecture: str, x: torch.Tensor, out: Path) -> None:
    """Train an SAE with SAELens on ``x`` for a while and save it as SAELens does."""
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(architecture)
    site = {"model_name": "spalf/demo-2l", "hook_name": HOOK_POINT}
    metadata = SAEMetadata(**site, context_size=64, prepend_bos=False)
    normalised = {"normalize_activations": "expected_average_only_in", "metadata": metadata}
    sae = sae_class(config_class(d_in=64, d_sae=96, **TRAINED[architecture], **normalised))
    steps, batch = 60, 512
    cfg = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=3e-3,
        lr_end=3e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
    )
    SAETrainer(cfg=cfg, sae=sae, data_provider=itertools.cycle(x.split(batch))).fit()
    sae.save_inference_model(out)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("architecture", TRAINED)
def test_an_sae_that_saelens_trained_is_a_row_with_the_figures_of_its_own_evaluation(
    demo_run: Path,
    demo_config: RunConfig,
    cpu_context: StepContext,
    model: LanguageModel,
    demo_tokens: torch.Tensor,
    tmp_path: Path,
    architecture: str,
) -> None:
    train_theirs(architecture, model.activations(demo_tokens).flatten(0, 1), tmp_path / "theirs")
    imported = tmp_path / "imported" / architecture
    command = ["--l0-target", "8", str(tmp_path / "theirs"), str(imported)]
    import_.main(command, standalone_mode=False)
    report = imported / "evaluation.json"
    evaluate(demo_config, demo_run / "calibration", {"sae": imported}, report, cpu_context)
    frontier, _ = aggregate([demo_run / "evaluation.json", report], tmp_path / "tables")
    row = pd.read_csv(frontier).set_index("method").loc[architecture]
    assert row["tokens"] == demo_tokens.numel() and row["explained_variance"] > 0.2
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    saved_as = "topk" if architecture == "topk" else "jumprelu"
    assert loaded.cfg.architecture() == saved_as
    assert_same_figures(their_evaluation(loaded, model, demo_tokens), row.to_dict())
