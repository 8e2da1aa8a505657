"""What ``spalf export --format saelens`` writes, in SAELens itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spalf import LoadedSAE, load_sae
from spalf.evaluation import evaluate_downstream
from spalf.interchange.export import export
from spalf.models import LanguageModel, load_model

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


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_their_evaluation_measures_what_ours_does(
    ours: LoadedSAE, theirs: Any, model: LanguageModel, demo_tokens: torch.Tensor
) -> None:
    from datasets import Dataset
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    bridge = model._model  # type: ignore[attr-defined]
    count, width = demo_tokens.shape
    store = ActivationsStore.from_sae(
        bridge,
        theirs,
        Dataset.from_dict({"tokens": demo_tokens.tolist()}),
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
        theirs, store, bridge, ActivationScaler(), config, exclude_special_tokens=False
    )
    expected = evaluate_downstream(model, {"sae": ours.coder}, [demo_tokens])["sae"]
    loss = measured["model_performance_preservation"]
    assert measured["sparsity"]["l0"] == pytest.approx(expected.l0, abs=1e-3)
    quality = measured["reconstruction_quality"]
    assert quality["explained_variance"] == pytest.approx(expected.explained_variance, abs=1e-4)
    assert quality["mse"] == pytest.approx(expected.mse, rel=1e-4)
    assert loss["ce_loss_without_sae"] == pytest.approx(expected.ce_clean, abs=1e-4)
    assert loss["ce_loss_with_sae"] == pytest.approx(expected.ce_sae, abs=1e-4)
    assert loss["ce_loss_with_ablation"] == pytest.approx(expected.ce_zero, abs=1e-4)
    assert loss["ce_loss_score"] == pytest.approx(expected.ce_recovered, abs=1e-4)
