from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spalf.config import DatasetConfig
from spalf.data import tokenize_dataset
from spalf.errors import UserError
from spalf.models import LanguageModel, hook_points, load_model, load_tokenizer, resolve_model
from tests.helpers_models import D_MODEL, FAMILIES, N_LAYERS, VOCAB_SIZE, save_tiny_model

SITES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
BACKENDS = ("huggingface", "transformer_lens")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny models")
    for family in FAMILIES:
        save_tiny_model(family, root / family)
    return root


def load(tiny_dir: Path, family: str, backend: str, site: str, layer: int = 1) -> LanguageModel:
    name = str(tiny_dir / family)
    return load_model(name, f"blocks.{layer}.{site}", backend=backend, device="cpu")


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(1))


def reference_sites(model: LanguageModel, x: torch.Tensor) -> list[torch.Tensor]:
    """Hugging Face's own hidden states: embeddings, then the residual stream after each block."""
    hidden: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, args, out: hidden.append(out))
        for name, block in model._model.named_modules()  # type: ignore[attr-defined]
        if name.split(".")[-1].isdigit()
    ]
    with torch.no_grad():
        model._model(input_ids=x)  # type: ignore[attr-defined]
    for handle in handles:
        handle.remove()
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("site", SITES)
def test_i8_identity_patch_reproduces_clean_logits(
    tiny_dir: Path, family: str, backend: str, site: str
) -> None:
    model = load(tiny_dir, family, backend, site)
    x = tokens()
    clean = model.logits(x)
    assert clean.shape == (3, 17, VOCAB_SIZE)
    assert clean.dtype == torch.float32
    assert torch.equal(model.patched_logits(x, lambda site: site), clean)
    assert not torch.allclose(model.patched_logits(x, lambda site: site + 1.7), clean)
    # A stop at the site leaves nothing behind.
    model.activations(x)
    assert torch.equal(model.logits(x), clean)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_i8_gradient_reaches_the_patch(tiny_dir: Path, family: str, backend: str) -> None:
    model = load(tiny_dir, family, backend, "hook_resid_post", layer=0)
    delta = torch.zeros(D_MODEL, requires_grad=True)
    direction = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    x = tokens()

    def score(offset: torch.Tensor) -> torch.Tensor:
        return (model.patched_logits(x, lambda site: site + offset) @ direction).sum()

    (gradient,) = torch.autograd.grad(score(delta), delta)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        rise = (score(step) - score(-step)) / 2
    assert float(rise) == pytest.approx(float(gradient @ step), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_backends_agree(tiny_dir: Path, family: str, site: str) -> None:
    pair = [load(tiny_dir, family, backend, site, layer=0) for backend in BACKENDS]
    x = tokens()
    noise = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    sites = [model.activations(x) for model in pair]
    assert sites[0].shape == (3, 17, D_MODEL)
    torch.testing.assert_close(*sites)
    gradients, patched = [], []
    for model in pair:
        offset = noise.clone().requires_grad_()
        logits = model.patched_logits(x, lambda site, offset=offset: 0.5 * site + offset)
        logits.square().sum().backward()
        patched.append(logits.detach())
        gradients.append(offset.grad)
    torch.testing.assert_close(*patched, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert torch.equal(pair[0].unembedding(), pair[1].unembedding())
    for model in pair:
        shape = (model.d_model, model.d_vocab, model.n_layers)
        assert shape == (D_MODEL, VOCAB_SIZE, N_LAYERS)
        assert isinstance(model, LanguageModel)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_residual_stream_and_what_is_added_to_it(tiny_dir: Path, family: str) -> None:
    x = tokens()
    kept = {
        (layer, site): load(tiny_dir, family, "huggingface", site, layer).activations(x)
        for layer in range(N_LAYERS)
        for site in SITES
    }
    own = reference_sites(load(tiny_dir, family, "huggingface", "hook_resid_pre"), x)
    for layer in range(N_LAYERS):
        pre, attn, mlp, post = (kept[layer, site] for site in SITES)
        torch.testing.assert_close(post, own[layer])
        torch.testing.assert_close(pre + attn + mlp, post)
    assert torch.equal(kept[1, "hook_resid_pre"], kept[0, "hook_resid_post"])


def test_layers_above_the_site_are_not_run(tiny_dir: Path) -> None:
    model = load(tiny_dir, "gpt_neox", "huggingface", "hook_resid_post", layer=0)
    ran = []
    for name, module in model._model.named_modules():  # type: ignore[attr-defined]
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    activations = model.activations(tokens())
    assert "gpt_neox.layers.0.mlp" in ran
    assert not any("layers.1" in name or "embed_out" in name for name in ran)
    assert not activations.requires_grad


def test_unembedding_maps_the_normalised_residual_to_logits(tiny_dir: Path) -> None:
    model = load(tiny_dir, "gpt_neox", "huggingface", "hook_resid_post")
    final_norm = model._model.gpt_neox.final_layer_norm  # type: ignore[attr-defined]
    x = tokens()
    with torch.no_grad():
        logits = final_norm(model.activations(x)) @ model.unembedding()
    torch.testing.assert_close(logits, model.logits(x))


def test_model_is_frozen_and_in_evaluation_mode(tiny_dir: Path) -> None:
    for backend in BACKENDS:
        inner = load(tiny_dir, "gpt2", backend, "hook_resid_post")._model  # type: ignore[attr-defined]
        assert not any(p.requires_grad for p in inner.parameters())
        assert not any(module.training for module in inner.modules())


def test_auto_backend(tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    model = load(tiny_dir, "llama", "auto", "hook_resid_post")
    assert type(model).__name__ == "HuggingFaceModel"
    config = GPTNeoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=D_MODEL,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(str(tiny_dir / "gpt2")).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "blocks.1.hook_resid_post", device="cpu")
    assert type(model).__name__ == "TransformerLensModel"
    x = tokens()
    assert torch.equal(model.patched_logits(x, lambda site: site), model.logits(x))
    with pytest.raises(UserError, match=r"^backend = 'huggingface': maps gpt2.*transformer_lens"):
        load_model(str(tmp_path), "blocks.1.hook_resid_post", backend="huggingface", device="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "hook_point", ["blocks.2.hook_resid_post", "blocks.0.hook_nothing", "resid", "blocks.x"]
)
def test_unknown_hook_point_lists_the_valid_ones(
    tiny_dir: Path, backend: str, hook_point: str
) -> None:
    with pytest.raises(UserError) as raised:
        load_model(str(tiny_dir / "gpt2"), hook_point, backend=backend, device="cpu")
    message = str(raised.value)
    assert message.startswith(f"hook_point = {hook_point!r}: no such site")
    assert all(f"blocks.L.{site}" in message for site in SITES)
    assert "L = 0 to 1" in message


def test_site_of_another_width_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(UserError, match="no such site"):
        load_model(
            str(tiny_dir / "gpt2"), "blocks.0.attn.hook_q", backend="transformer_lens", device="cpu"
        )


def test_hook_points_of_a_config() -> None:
    from transformers import GPT2Config

    names = hook_points(GPT2Config(n_layer=3))
    assert len(names) == 12
    assert {"blocks.0.hook_resid_pre", "blocks.2.hook_attn_out"} <= set(names)


def test_missing_models_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spalf.hub import hub_reachable

    def fails(name: str) -> str:
        with pytest.raises(UserError) as raised:
            load_model(name, "blocks.0.hook_resid_post", device="cpu")
        assert raised.value.key == "model_name"
        assert raised.value.value == name
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no config.json" in fails(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "no *.safetensors weights" in fails(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    assert "weights cannot be read" in fails(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "configuration cannot be read" in fails(str(tmp_path))
    assert "no such directory" in fails(str(tmp_path / "missing"))
    assert "spalf/demo-2l" in fails("spalf/no-such-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_reachable.cache_clear()
    assert "with no network, give a local directory" in fails("nobody/no-such-model")
    hub_reachable.cache_clear()


@pytest.mark.parametrize("name", ["spalf/demo-2l", "spalf/demo-4l"])
def test_bundled_model(name: str) -> None:
    model = load_model(name, "blocks.1.hook_resid_post", device="cpu")
    tokenizer = load_tokenizer(name)
    text = "import os\n\n\ndef main() -> None:\n    return None  # naïve\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == model.d_vocab == model.unembedding().shape[1] == 2048
    assert resolve_model(name).endswith(name.removeprefix("spalf/"))


@pytest.mark.parametrize("name", ["spalf/demo-2l", "spalf/demo-4l"])
def test_bundled_model_has_the_recorded_held_out_loss(name: str, tmp_path: Path) -> None:
    record = json.loads((Path(resolve_model(name)) / "training.json").read_text())
    model = load_model(name, "blocks.1.hook_resid_post", device="cpu")
    splits = tokenize_dataset(
        DatasetConfig(path="python-stdlib"),
        load_tokenizer(name),
        tmp_path,
        seq_len=record["seq_len"],
        train_tokens=1,
        calibration_tokens=1,
        evaluation_tokens=10**9,
    )
    x = splits.evaluation.sequences(0, 96, seed=0)
    logits = model.logits(x)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    assert float(loss) == pytest.approx(record["held_out_loss"], abs=0.3)


def test_bundled_models_are_small() -> None:
    root = Path(resolve_model("spalf/demo-2l")).parent
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) < 5e6


def test_huggingface_backend_imports_no_transformer_lens() -> None:
    code = (
        "import sys, spalf.models as m\n"
        "assert not {'transformers', 'transformer_lens', 'datasets'} & set(sys.modules)\n"
        "m.load_model('spalf/demo-2l', 'blocks.0.hook_resid_pre', device='cpu')\n"
        "assert not {'transformer_lens', 'datasets', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
