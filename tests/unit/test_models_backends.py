"""Both backends on every family: the same numbers, in every dtype, into the same gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from spalf.activations import next_token_cross_entropy, next_token_kl
from spalf.errors import UserError
from spalf.models import LanguageModel, load_model, patched_site
from tests.helpers_models import (
    D_MODEL,
    FAMILIES,
    N_LAYERS,
    VOCAB_SIZE,
    save_tiny_model,
    tiny_config,
    tiny_tokenizer,
)
from tests.helpers_planted import trained_like

SITES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
BACKENDS = ("huggingface", "transformer_lens")


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny models")
    for family in FAMILIES:
        save_tiny_model(family, root / family)
    return root


def tokens(seed: int = 1, n_sequences: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (n_sequences, 17), generator=generator)


def load(directory: Path, backend: str, hook_point: str, dtype: str = "float32") -> LanguageModel:
    return load_model(str(directory), hook_point, backend=backend, dtype=dtype, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_phase_two_gradients_into_an_sae_agree(tiny_dir: Path, family: str, site: str) -> None:
    """What Phase 2 differentiates: KL and error with the reconstruction at the site (M16)."""
    pair = [load(tiny_dir / family, backend, f"blocks.0.{site}") for backend in BACKENDS]
    x = tokens()
    sae = trained_like(pair[0].activations(tokens(seed=2, n_sequences=32)).flatten(0, 1), 64, 4)
    with torch.no_grad():
        # Thresholds are order statistics of pre-activations; move them off, so that none is equal.
        sae.log_threshold.add_(0.003)
    found = []
    for model in pair:
        sae.zero_grad()

        def reconstruct(site: torch.Tensor) -> torch.Tensor:
            return sae(site.flatten(0, 1)).x_hat.view_as(site)

        patched = model.patched_logits(x, reconstruct)
        kl, ce = next_token_kl(model.logits(x), patched), next_token_cross_entropy(patched, x)
        error = (reconstruct(model.activations(x)) - model.activations(x)).square().mean()
        (kl.mean() + ce.mean() + error).backward()
        grads = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
        found.append((kl, ce, grads))
    (kl, ce, grads), (their_kl, their_ce, their_grads) = found
    assert grads.keys() == {"W_enc", "b_enc", "log_threshold", "W_dec", "b_dec"}
    torch.testing.assert_close(kl, their_kl, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ce, their_ce, atol=1e-5, rtol=1e-4)
    for name, gradient in grads.items():
        assert gradient.abs().max() > 0, name
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            gradient, their_grads[name], atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_agrees_with_float32_and_between_backends(
    tiny_dir: Path, family: str, site: str, dtype: str
) -> None:
    directory, hook_point = tiny_dir / family, f"blocks.1.{site}"
    exact = load(directory, "huggingface", hook_point)
    pair = [load(directory, backend, hook_point, dtype) for backend in BACKENDS]
    x, eps = tokens(), torch.finfo(getattr(torch, dtype)).eps
    for rounded in pair:
        activations, logits = rounded.activations(x), rounded.logits(x)
        assert activations.dtype == logits.dtype == rounded.unembedding().dtype == torch.float32
        assert torch.equal(rounded.patched_logits(x, lambda site: site), logits)
        # A model of two layers adds a few dozen roundings of relative size eps to each value.
        assert 0 < relative_error(activations, exact.activations(x)) < 6 * eps
        assert 0 < relative_error(logits, exact.logits(x)) < 6 * eps
        torch.testing.assert_close(rounded.unembedding(), exact.unembedding(), rtol=eps, atol=1e-7)
        offset = torch.zeros(D_MODEL, requires_grad=True)
        shifted = rounded.patched_logits(x, lambda site, offset=offset: site + offset)
        shifted.logsumexp(-1).sum().backward()
        assert offset.grad is not None and bool(offset.grad.isfinite().all())
    ours, theirs = pair
    assert torch.equal(ours.unembedding(), theirs.unembedding())
    assert relative_error(ours.activations(x), theirs.activations(x)) < 6 * eps


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def final_norm(model: Any) -> Any:
    """The last normalisation of a Hugging Face model, and its cap on the logits."""
    named = dict(model.named_modules())
    names = ("transformer.ln_f", "gpt_neox.final_layer_norm", "model.norm")
    return next(named[name] for name in names if name in named)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_unembedding_is_the_raw_matrix_behind_the_last_norm(
    tiny_dir: Path, family: str, backend: str
) -> None:
    """Nothing is folded into W_U: the norm keeps its weights, and Gemma 2 caps its logits."""
    last = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    plain: Any = load(tiny_dir / family, "huggingface", last)
    model = load(tiny_dir / family, backend, last)
    x = tokens()
    with torch.no_grad():
        logits = final_norm(plain._model)(model.activations(x)) @ model.unembedding()
    cap = getattr(plain._model.config, "final_logit_softcapping", None)
    assert (cap is not None) == (family == "gemma2")
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    torch.testing.assert_close(logits, model.logits(x), atol=2e-5, rtol=2e-5)
    tied = plain._model.config.tie_word_embeddings
    assert tied == (family in {"gpt2", "gemma2"})
    if tied:
        embeddings = plain._model.get_input_embeddings().weight.detach()
        assert torch.equal(model.unembedding(), embeddings.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sub_layers_one_after_the_other(tmp_path: Path, backend: str) -> None:
    """GPT-NeoX without parallel residuals: the MLP reads what attention wrote."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("gpt_neox")
    config.use_parallel_residual = False
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    x = tokens()
    pre, attn, mlp, post = (
        load(tmp_path, backend, f"blocks.1.{site}").activations(x) for site in SITES
    )
    torch.testing.assert_close(pre + attn + mlp, post)
    shifted = load(tmp_path, backend, "blocks.1.hook_attn_out")
    seen: list[torch.Tensor] = []
    mlp_site = patched_site(shifted._model, "blocks.1.hook_mlp_out", lambda v: seen.append(v) or v)  # type: ignore[attr-defined, func-returns-value]
    with torch.no_grad(), mlp_site:
        shifted.patched_logits(x, lambda site: site + 1)
    assert not torch.allclose(seen[0], mlp)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_patched_site_of_somebody_elses_model(tiny_dir: Path, family: str, site: str) -> None:
    from transformers import AutoModelForCausalLM

    x, hook_point = tokens(), f"blocks.1.{site}"
    ours = load(tiny_dir / family, "huggingface", hook_point)

    def patch(value: torch.Tensor) -> torch.Tensor:
        assert value.dtype == torch.float32
        return 0.5 * value + 1

    expected, clean = ours.patched_logits(x, patch), ours.logits(x)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir / family)
    bridge: Any = load(tiny_dir / family, "transformer_lens", hook_point)
    with torch.no_grad():
        with patched_site(model, hook_point, patch):
            torch.testing.assert_close(model(x).logits, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(model(x).logits, clean, atol=2e-5, rtol=2e-5)
        with patched_site(bridge._model, hook_point, patch):
            torch.testing.assert_close(bridge._model(x), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(bridge._model(x), clean, atol=2e-5, rtol=2e-5)


def test_patched_site_in_low_precision_keeps_the_models_dtype(tiny_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_dir / "llama", dtype=torch.bfloat16)
    with torch.no_grad(), patched_site(model, "blocks.0.hook_resid_post", lambda x: x * 2):
        assert model(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.skipif(
    int(version("transformer-lens").split(".")[0]) > 3, reason="removed in TransformerLens 4"
)
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
def test_patched_site_of_a_hooked_transformer() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=4, d_vocab=20, act_fn="relu", seed=0
    )
    model = HookedTransformer(config)
    x = torch.arange(8)[None]
    clean = model(x)
    kept: list[torch.Tensor] = []
    model.add_hook("blocks.1.hook_resid_pre", lambda value, hook: kept.append(value.detach()))
    with patched_site(model, "blocks.0.hook_resid_post", torch.zeros_like):
        patched = model(x)
    assert not torch.allclose(patched, clean)
    assert float(kept[0].abs().max()) == 0
    # The hook that was there before is still there; ours is not.
    torch.testing.assert_close(model(x), clean)
    assert len(kept) == 2 and float(kept[1].abs().max()) > 0
    with pytest.raises(UserError, match=r"no such site; this model has .* L = 0 to 1"):
        patched_site(model, "blocks.0.hook_nothing", torch.zeros_like)


@pytest.fixture
def cached_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that is out of reach, with two revisions of a repository in its cache."""
    from huggingface_hub import constants

    from spalf.hub import hub_reachable

    repository = tmp_path / "hub" / "models--somebody--tiny"
    for seed, revision in enumerate(["main", "v2"]):
        commit = f"{seed}" * 40
        save_tiny_model("gpt_neox", repository / "snapshots" / commit, seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_reachable.cache_clear()
    yield "somebody/tiny"
    hub_reachable.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_revision_of_a_hub_model(cached_hub: str, backend: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": backend, "device": "cpu"}
    site = "blocks.1.hook_resid_post"
    main = load_model(cached_hub, site, **options)
    second = load_model(cached_hub, site, revision="v2", **options)
    local = load_model(str(save_tiny_model("gpt_neox", tmp_path / "v2", 1)), site, **options)
    x = tokens()
    assert torch.equal(second.logits(x), local.logits(x))
    assert not torch.allclose(main.logits(x), second.logits(x))
    with pytest.raises(UserError) as raised:
        load_model(cached_hub, site, revision="v3", **options)
    message = str(raised.value)
    assert "\n" not in message
    assert "with no network, give a local directory or a bundled model" in message


def test_a_family_that_nobody_knows(tiny_dir: Path, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nobody"}))
    with pytest.raises(UserError, match=r"model_name = .*configuration cannot be read"):
        load_model(str(tmp_path), "blocks.0.hook_resid_post", device="cpu")
