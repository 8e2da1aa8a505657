"""What ``spalf export`` writes for dictionary_learning and sparsify.

The arithmetic of either is a few lines, written out here after their documentation. Where the
libraries themselves are installed they read the same folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from spalf import LoadedSAE, load_sae
from spalf.interchange.export import export
from spalf.models import load_model

HOOK_POINT = "blocks.1.hook_resid_post"
K = 12


@pytest.fixture(scope="module")
def ours(demo_run: Path) -> LoadedSAE:
    return load_sae(demo_run / "phase2")


@pytest.fixture(scope="module")
def x(demo_tokens: torch.Tensor) -> torch.Tensor:
    model = load_model("spalf/demo-2l", HOOK_POINT, device="cpu")
    return model.activations(demo_tokens[:16]).flatten(0, 1)


@pytest.fixture(scope="module")
def trainer_dir(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "dictionary_learning"
    export(demo_run / "phase2", out, "dictionary_learning")
    return out / "trainer_0"


@pytest.fixture(scope="module")
def coder_dir(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "sparsify"
    export(demo_run / "phase2", out, "sparsify", k=K)
    return out / HOOK_POINT


def same_up_to_flips(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Equal codes, but for at most two pre-activations within rounding of their thresholds."""
    flipped = (ours > 0) != (theirs > 0)
    assert flipped.sum() <= 2
    torch.testing.assert_close(theirs[~flipped], ours[~flipped], atol=1e-4, rtol=1e-4)


def test_dictionary_learning_files(trainer_dir: Path, ours: LoadedSAE, x: torch.Tensor) -> None:
    assert {path.name for path in trainer_dir.iterdir()} == {"ae.pt", "config.json"}
    state = torch.load(trainer_dir / "ae.pt", weights_only=True)
    assert state.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    pre = x @ state["W_enc"] + state["b_enc"]
    z = functional.relu(pre * (pre > state["threshold"]))
    same_up_to_flips(z, ours.encode(x))
    x_hat = ours.encode(x) @ state["W_dec"] + state["b_dec"]
    torch.testing.assert_close(x_hat, ours.reconstruct(x), atol=1e-4, rtol=1e-4)

    config = json.loads((trainer_dir / "config.json").read_text())
    trainer = config["trainer"]
    assert trainer["dict_class"] == "JumpReluAutoEncoder"
    assert (trainer["activation_dim"], trainer["dict_size"]) == (64, 96)
    assert (trainer["layer"], trainer["submodule_name"]) == (1, "resid_post_layer_1")
    assert trainer["lm_name"] == "spalf/demo-2l"
    assert trainer["target_l0"] == 8
    assert config["buffer"]["ctx_len"] == 64


def test_dictionary_learning_itself(trainer_dir: Path, ours: LoadedSAE, x: torch.Tensor) -> None:
    why = "installing dictionary-learning would replace torch; make test puts it beside it"
    utils = pytest.importorskip("dictionary_learning.utils", reason=why)
    theirs, _ = utils.load_dictionary(str(trainer_dir), "cpu")
    assert type(theirs).__name__ == "JumpReluAutoEncoder"
    with torch.no_grad():
        same_up_to_flips(theirs.encode(x), ours.encode(x))
        decoded = theirs.decode(ours.encode(x))
    torch.testing.assert_close(decoded, ours.reconstruct(x), atol=1e-4, rtol=1e-4)


def sparsify_forward(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[tokens, d_sae]`` and reconstruction, after sparsify's README and README alone."""
    state = load_file(folder / "sae.safetensors")
    assert state.keys() == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    pre = functional.linear(x - state["b_dec"], state["encoder.weight"], state["encoder.bias"])
    top = pre.relu().topk(json.loads((folder / "cfg.json").read_text())["k"], dim=-1)
    z = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    return z, z @ state["W_dec"] + state["b_dec"]


def explained_variance(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    return float(1 - (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())


def test_sparsify_keeps_the_k_features_that_add_most(
    coder_dir: Path, ours: LoadedSAE, x: torch.Tensor
) -> None:
    z, x_hat = sparsify_forward(coder_dir, x)
    assert int((z > 0).sum(dim=-1).max()) == K
    # The same weights with another gate: thresholds play no part in what is kept.
    ungated = ours.coder.pre_activations(x).relu() * ours.W_dec.norm(dim=1)
    kept = ungated.topk(K, dim=-1).values.sum(dim=-1)
    torch.testing.assert_close(z.sum(dim=-1), kept, atol=1e-3, rtol=1e-3)
    both = (z > 0) & (ours.encode(x) > 0)
    assert both.sum() > 3 * len(x)
    torch.testing.assert_close(z[both], ungated[both], atol=1e-4, rtol=1e-4)
    assert explained_variance(x, x_hat) > 0.2


def test_sparsify_with_every_feature_is_the_sae_without_thresholds(
    demo_run: Path, tmp_path: Path, ours: LoadedSAE, x: torch.Tensor
) -> None:
    export(demo_run / "phase2", tmp_path / "all", "sparsify", k=96)
    _, x_hat = sparsify_forward(tmp_path / "all" / HOOK_POINT, x)
    open_gate = ours.coder.decode(ours.coder.pre_activations(x).relu())
    torch.testing.assert_close(x_hat, open_gate, atol=1e-4, rtol=1e-4)


def test_sparsify_itself(coder_dir: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # its kernel is for GPUs
    sparsify = pytest.importorskip("sparsify")
    theirs: Any = sparsify.SparseCoder.load_from_disk(coder_dir)
    assert theirs.cfg.k == K and theirs.num_latents == 96
    z, x_hat = sparsify_forward(coder_dir, x)
    with torch.no_grad():
        acts, indices, _ = theirs.encode(x)
        torch.testing.assert_close(theirs.decode(acts, indices), x_hat, atol=1e-4, rtol=1e-4)
    their_z = torch.zeros_like(z).scatter(-1, indices, acts)
    torch.testing.assert_close(their_z, z, atol=1e-4, rtol=1e-4)
    by_name = sparsify.SparseCoder.load_many(str(coder_dir.parent), local=True)
    assert list(by_name) == [HOOK_POINT]
