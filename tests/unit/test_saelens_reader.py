"""The reader of SAELens's format computes what SAELens itself does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spalf.errors import UserError
from spalf.evaluation.protocols import ScalableCoder
from spalf.interchange import is_saelens_folder, read_saelens

sae_lens = pytest.importorskip("sae_lens")

D_MODEL, D_SAE = 12, 40
TOLERANCE = 1e-5


def activations(tokens: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(tokens, D_MODEL, generator=generator) + 1


def fill(sae: Any) -> Any:
    """Weights that exercise every term; codes are sparse but not empty."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values.abs() if name == "threshold" else values
    return sae


def inference_sae(architecture: str, **options: Any) -> Any:
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    return fill(sae_class(config_class(d_in=D_MODEL, d_sae=D_SAE, **options)))


def assert_same(folder: Path, x: Tensor) -> None:
    theirs, ours = sae_lens.SAE.load_from_disk(folder), read_saelens(folder)
    with torch.no_grad():
        z = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), z, rtol=TOLERANCE, atol=TOLERANCE)
        x_hat = theirs.decode(z)
    torch.testing.assert_close(ours.decode(z), x_hat, rtol=TOLERANCE, atol=TOLERANCE)
    assert 0 < (z != 0).float().mean() < 1


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "normalize_activations",
    ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"],
)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("jumprelu", {}),
        ("standard", {}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    ],
    ids=["jumprelu", "standard", "topk", "topk by norm"],
)
def test_encode_and_decode_are_those_of_saelens(
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
    normalize_activations: Any,
    apply_b_dec_to_input: bool,
) -> None:
    sae = inference_sae(
        architecture,
        **options,
        normalize_activations=normalize_activations,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    sae.save_model(tmp_path)
    assert_same(tmp_path, activations())


@pytest.mark.parametrize("method", ["batchtopk", "topk", "jumprelu"])
def test_trained_saes_are_read_as_saelens_saves_them(tmp_path: Path, method: str) -> None:
    """With the scale of the activations folded in, and BatchTopK's threshold for each feature."""
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(method)
    options: dict[str, Any] = {} if method == "jumprelu" else {"k": 4}
    normalised = {"normalize_activations": "expected_average_only_in"}
    sae = fill(sae_class(config_class(d_in=D_MODEL, d_sae=D_SAE, **options, **normalised)))
    if method == "batchtopk":
        sae.topk_threshold.fill_(2.0)
    sae.fold_activation_norm_scaling_factor(0.7)
    sae.save_inference_model(tmp_path)
    assert is_saelens_folder(tmp_path)
    assert_same(tmp_path, activations())
    assert read_saelens(tmp_path).cfg.metadata["training_architecture"] == method


def test_folders_of_versions_before_6_are_read(tmp_path: Path) -> None:
    sae = inference_sae("topk", k=3)
    sae.save_model(tmp_path)
    old = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "gpt2",
        "hook_name": "blocks.1.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "normalize_activations": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    assert_same(tmp_path, activations())
    assert read_saelens(tmp_path).cfg.metadata["hook_name"] == "blocks.1.hook_resid_pre"


def test_scaled_thresholds_change_the_gate_and_nothing_else(tmp_path: Path) -> None:
    inference_sae("jumprelu").save_model(tmp_path)
    sae, x = read_saelens(tmp_path), activations()
    scaled: ScalableCoder = sae
    z, sparser = sae.encode(x), scaled.scaled_thresholds(3.0).encode(x)
    kept = sparser != 0
    assert 0 < kept.sum() < (z != 0).sum()
    assert torch.equal(sparser[kept], z[kept])
    assert (z[kept] > 3 * sae.threshold.expand_as(z)[kept]).all()
    assert torch.equal(sae.encode(x), z)


def test_only_jumprelu_has_thresholds(tmp_path: Path) -> None:
    inference_sae("topk", k=2).save_model(tmp_path)
    sae = read_saelens(tmp_path)
    assert not sae.has_thresholds
    with pytest.raises(UserError, match="no thresholds to scale"):
        sae.scaled_thresholds(2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inference_sae("jumprelu").save_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "gated"}, "architecture = 'gated'"),
        ({"architecture": "topk", "k": 0}, "k = 0"),
        ({"normalize_activations": "covariance_whitening"}, "folded into the weights"),
        ({"d_sae": 41}, "has shape"),
        ({"d_in": "wide"}, "no SAELens configuration"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(
    folder: Path, change: dict[str, Any], words: str
) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        read_saelens(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_one_line(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "threshold"}, weights)
    with pytest.raises(UserError, match="a jumprelu SAE has W_enc, b_enc, W_dec, b_dec, threshold"):
        read_saelens(folder)
    weights.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        read_saelens(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_saelens(folder)
    assert not is_saelens_folder(folder)
