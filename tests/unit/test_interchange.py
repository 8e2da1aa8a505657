from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spalf
from spalf import load_sae, patched
from spalf.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from spalf.cli.errors import status_of
from spalf.cli.interchange import export as command
from spalf.errors import UserError
from spalf.interchange.card import Subject, model_card
from spalf.interchange.export import export
from spalf.interchange.fold import fold, unit_norm_decoder
from spalf.models import load_model, resolve_model
from spalf.sae import StratifiedSAE
from spalf.training.state import sae_from_tensors
from tests.helpers_planted import allocated, correlated, trained_like

HOOK_POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def activations(demo_tokens: torch.Tensor) -> torch.Tensor:
    model = load_model("spalf/demo-2l", HOOK_POINT, device="cpu")
    return model.activations(demo_tokens)


def hugging_face_model() -> Any:
    from transformers import AutoModelForCausalLM

    path = resolve_model("spalf/demo-2l")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, spalf, spalf.config\n"
        "assert {'load_sae', 'patched'} <= set(dir(spalf))\n"
        "assert not {'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)\n"
        "spalf.load_sae\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        spalf.load_model  # noqa: B018


@pytest.mark.parametrize("step", ["init", "phase1", "phase2"])
def test_loaded_sae_is_the_one_on_disk(
    demo_run: Path, step: str, activations: torch.Tensor
) -> None:
    sae = load_sae(demo_run / step)
    original = sae_from_tensors(read_checkpoint(demo_run / step).tensors, torch.device("cpu"))
    z = sae.encode(activations)
    assert torch.equal(z, original.encode(activations))
    assert torch.equal(
        sae.reconstruct(activations),
        original(activations.flatten(0, 1)).x_hat.view(activations.shape),
    )
    torch.testing.assert_close(z @ sae.W_dec + sae.b_dec, sae.decode(z))
    assert bool(((z == 0) | (z > sae.threshold)).all())
    assert (sae.d_model, sae.d_sae) == (64, 96) and z.dtype == torch.float32
    assert (sae.model_name, sae.hook_point) == ("spalf/demo-2l", HOOK_POINT)
    assert not any(p.requires_grad for p in sae.coder.parameters())


def test_low_precision_activations_give_float32_codes(
    demo_run: Path, activations: torch.Tensor
) -> None:
    sae = load_sae(str(demo_run / "phase2"), device=torch.device("cpu"))
    rounded = activations.bfloat16()
    assert torch.equal(sae.encode(rounded), sae.encode(rounded.float()))
    assert sae.reconstruct(rounded).dtype == torch.float32


def test_gradients_reach_the_activations(demo_run: Path, activations: torch.Tensor) -> None:
    sae = load_sae(demo_run / "phase2")
    x = activations[0].clone().requires_grad_()
    sae.encode(x).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_three_files_are_enough(demo_run: Path, tmp_path: Path, activations: torch.Tensor) -> None:
    for name in ("metadata.json", "model.safetensors", "tensors.safetensors"):
        shutil.copy(demo_run / "phase2" / name, tmp_path / name)
    z = load_sae(tmp_path).encode(activations)
    assert torch.equal(z, load_sae(demo_run / "phase2").encode(activations))


def test_an_altered_file_is_refused_by_name(demo_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_run / "phase1", tmp_path / "copy"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors.*does not match its digest"):
        load_sae(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors.*is missing"):
        load_sae(copy)


def test_directories_without_an_sae_say_where_to_look(demo_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no SAE; give .*phase2$"):
        load_sae(demo_run)
    with pytest.raises(UserError, match="give one of phase2, phase1, init"):
        load_sae(demo_run / "calibration")
    with pytest.raises(UserError, match="give one of phase2, phase1, init"):
        load_sae(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        load_sae(tmp_path / "missing")


def test_activations_of_another_width_are_refused(demo_run: Path) -> None:
    with pytest.raises(UserError, match=r"x = \[2, 32\]: activations must be \[\.\.\., 64\]"):
        load_sae(demo_run / "phase2").encode(torch.zeros(2, 32))


def test_patched_puts_the_reconstruction_in(demo_run: Path, demo_tokens: torch.Tensor) -> None:
    sae, tokens = load_sae(demo_run / "phase2"), demo_tokens[:4]
    model = load_model("spalf/demo-2l", HOOK_POINT, device="cpu")
    expected = model.patched_logits(tokens, sae.reconstruct)
    clean = model.logits(tokens)
    with patched(model, sae):
        assert torch.equal(model.logits(tokens), expected)
    assert torch.equal(model.logits(tokens), clean)

    plain = hugging_face_model()
    with torch.no_grad(), patched(plain, sae):
        torch.testing.assert_close(plain(tokens).logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, clean)

    bridge = load_model(
        "spalf/demo-2l", HOOK_POINT, backend="transformer_lens", device="cpu"
    )._model  # type: ignore[attr-defined]
    with torch.no_grad(), patched(bridge, sae):
        torch.testing.assert_close(bridge(tokens), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), clean, atol=1e-4, rtol=1e-4)


def test_patched_leaves_a_model_of_others_as_it_was(demo_run: Path) -> None:
    sae, model = load_sae(demo_run / "phase2"), hugging_face_model().train()
    calls: list[str] = []
    block = model.get_submodule("gpt_neox.layers.1")
    handle = block.register_forward_hook(lambda *_: calls.append("theirs"))
    tokens = torch.arange(8)[None]
    with pytest.raises(RuntimeError, match="inside"), patched(model, sae):
        model(tokens).logits.sum().backward()
        raise RuntimeError("inside")
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings().weight.grad is not None
    model(tokens)
    assert calls == ["theirs", "theirs"]
    handle.remove()
    assert not block._forward_hooks


def test_patched_generation_is_that_of_the_patched_model(
    demo_run: Path, demo_tokens: torch.Tensor
) -> None:
    sae, model, prompt = load_sae(demo_run / "phase2"), hugging_face_model(), demo_tokens[:1, :16]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), patched(model, sae):
        generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        text = prompt
        for _ in range(4):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generated, text)


def test_patched_says_what_does_not_fit(demo_run: Path) -> None:
    sae, model = load_sae(demo_run / "phase2"), hugging_face_model()
    with pytest.raises(UserError, match=r"hook_point = 'blocks.9.*no such site"):
        patched(model, sae, "blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=r"model = 'Linear': must be a model of TransformerLens"):
        patched(torch.nn.Linear(2, 2), sae)
    opened = load_model("spalf/demo-2l", "blocks.0.hook_resid_pre", device="cpu")
    with pytest.raises(UserError, match=r"the model is open at blocks\.0\.hook_resid_pre"):
        patched(opened, sae)
    other = load_model("spalf/demo-4l", HOOK_POINT, device="cpu")
    with (
        pytest.raises(UserError, match=r"activations must be \[\.\.\., 64\]"),
        patched(other, sae),
    ):
        other.logits(torch.zeros(1, 4, dtype=torch.int64))


def folded_forward(sae: StratifiedSAE, x: torch.Tensor, flag: bool) -> tuple[torch.Tensor, ...]:
    w = fold(sae, apply_b_dec_to_input=flag)
    pre = (x - flag * w.b_dec) @ w.W_enc + w.b_enc
    z = pre * (pre > w.threshold)
    return z, z @ w.W_dec + w.b_dec


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("rank", ["full", "low", "none"])
def test_folded_weights_compute_the_same(flag: bool, rank: str) -> None:
    from spalf.whitening import RunningCovariance, SoftZCA

    # Thresholds are order statistics of the activations of the initialisation, so these are others.
    known, x = correlated(4096, 32, seed=3).chunk(2)
    sae = trained_like(known, 96, n_anchored=8)
    if rank != "full":
        running = RunningCovariance(32)
        running.update(known)
        moments = running.moments()
        low = SoftZCA.fit(moments, 100.0, 0.3, max_full_rank=8)
        sae.whitener = low if rank == "low" else SoftZCA.identity(moments.mean)
        assert not sae.whitener.is_full_rank
    z, x_hat = folded_forward(sae, x, flag)
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(x)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z, sae.encode(x), atol=1e-4, rtol=1e-4)


def test_subtracting_b_dec_first_survives_a_large_mean() -> None:
    """Where the mean is a thousand times the spread, x·W_enc + b_enc cancels badly."""
    known, x = (correlated(2048, 32, seed=4) + 1000).chunk(2)
    sae = trained_like(known, 64)
    whitened = (x.double() - sae.whitener.mean) @ sae.whitener.apply(torch.eye(32)).double()
    exact = (whitened @ sae.W_enc.T.double() + sae.b_enc.double()).detach()
    errors = {}
    for flag in (True, False):
        w = fold(sae, apply_b_dec_to_input=flag)
        pre = (x - flag * w.b_dec) @ w.W_enc + w.b_enc
        errors[flag] = float((pre - exact).norm() / exact.norm())
    assert errors[True] < 1e-5
    assert errors[True] < errors[False] / 30


def test_unit_norm_decoder_changes_codes_only() -> None:
    known, x = correlated(1024, 24, seed=5).chunk(2)
    w = fold(trained_like(known, 48), apply_b_dec_to_input=False)
    u = unit_norm_decoder(w)
    torch.testing.assert_close(u.W_dec.norm(dim=1), torch.ones(48))
    codes = []
    for weights in (w, u):
        pre = x @ weights.W_enc + weights.b_enc
        codes.append(pre * (pre > weights.threshold))
    torch.testing.assert_close(codes[0] @ w.W_dec, codes[1] @ u.W_dec, atol=1e-4, rtol=1e-4)
    assert torch.equal(codes[0] > 0, codes[1] > 0)


def test_unit_norm_decoder_leaves_empty_columns_alone() -> None:
    sae = allocated(correlated(256, 8, seed=6), 16)
    assert bool(unit_norm_decoder(fold(sae, apply_b_dec_to_input=True)).W_enc.isfinite().all())


def run_command(*arguments: object) -> tuple[int, str]:
    from click.testing import CliRunner

    runner = CliRunner()
    with runner.isolation() as streams:
        given = [str(argument) for argument in arguments]
        status = status_of(lambda: command.main(given, standalone_mode=False), debug=False)
        return status, streams[1].getvalue().decode()


def test_export_command_writes_a_folder_with_a_card(demo_run: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = tmp_path / "new" / "sae"
    arguments = ("--format", "saelens", "--card", demo_run / "phase2", out)
    assert run_command(*arguments) == (0, "")
    names = {path.name for path in out.iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "README.md"}
    assert not [path for path in out.parent.iterdir() if path != out]
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1

    card = ModelCard.load(out / "README.md")
    report = json.loads((demo_run / "evaluation.json").read_text())
    metrics = report["phases"]["phase2"]
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {name: metrics[name] for name in results}
    assert {"l0", "explained_variance", "delta_ce", "ce_recovered"} <= results.keys()
    assert card.data.library_name == "saelens" and card.data.license is None
    assert f"| {metrics['explained_variance']:.4g} |" in card.text
    assert "| `L0_target` | 8 |" in card.text and "| `F` | 96 |" in card.text
    assert "add `license: <id>`" in card.text

    status, message = run_command(*arguments)
    assert status == 2 and "exists already" in message


def test_card_without_or_with_the_wrong_evaluation(demo_run: Path, tmp_path: Path) -> None:
    export(demo_run / "init", tmp_path / "init", "saelens", card=True)
    text = (tmp_path / "init" / "README.md").read_text(encoding="utf-8")
    assert "It has not been evaluated." in text and "model-index" not in text
    other = tmp_path / "evaluation.json"
    report = json.loads((demo_run / "evaluation.json").read_text())
    report["cell"]["L0_target"] = 64
    other.write_text(json.dumps(report))

    def fails(path: Path) -> str:
        with pytest.raises(UserError) as raised:
            export(demo_run / "phase2", tmp_path / "x", "saelens", card=True, evaluation=path)
        return str(raised.value)

    assert "is of another SAE: L0_target differ" in fails(other)
    other.write_text("[]")
    assert "cannot be read" in fails(other)
    assert "no such file" in fails(tmp_path / "missing.json")
    assert not (tmp_path / "x").exists()


def test_options_that_do_not_fit_the_format(demo_run: Path, tmp_path: Path) -> None:
    source, out = demo_run / "phase2", tmp_path / "out"

    def fails(*options: object) -> str:
        status, message = run_command(*options, source, out)
        assert status == 2 and message.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return message

    assert "has no thresholds" in fails("--format", "sparsify")
    assert "must lie between 1 and F = 96" in fails("--format", "sparsify", "--k", 97)
    assert "is for sparsify only" in fails("--format", "saelens", "--k", 8)
    assert "'--format'" in fails("--format", "gemma")


def test_only_our_own_saes_are_exported(demo_run: Path, tmp_path: Path) -> None:
    export(demo_run / "phase2", tmp_path / "first", "saelens")
    with pytest.raises(UserError, match="is not an SAE of this package"):
        export(tmp_path / "first", tmp_path / "second", "saelens")


@pytest.mark.parametrize(
    ("model_name", "base_model", "shown"),
    [
        ("EleutherAI/pythia-160m", "EleutherAI/pythia-160m", "`EleutherAI/pythia-160m`"),
        ("gpt2", "gpt2", "`gpt2`"),
        ("spalf/demo-2l", None, "`spalf/demo-2l`"),
        ("/data/private/my-model", None, "`my-model`"),
    ],
)
def test_card_names_models_of_the_hub_and_no_paths(
    demo_run: Path, model_name: str, base_model: str | None, shown: str
) -> None:
    from huggingface_hub import ModelCard

    sae = load_sae(demo_run / "phase2")
    changed = {"model_name": model_name, "dataset": {"path": "/data/private/corpus.jsonl"}}
    settings = {**sae.metadata["config"], **changed}
    renamed = dataclasses.replace(sae, model_name=model_name)
    report = json.loads((demo_run / "evaluation.json").read_text())
    report["cell"]["model_name"] = model_name
    evaluation = demo_run / "renamed.json"
    evaluation.write_text(json.dumps(report))
    text = model_card(Subject(renamed, settings, "saelens", None), evaluation)
    evaluation.unlink()
    card = ModelCard(text)
    assert card.data.base_model == base_model
    assert shown in card.text and "`corpus.jsonl`" in card.text
    assert "/data/private" not in text


@pytest.mark.parametrize(
    ("path", "listed"), [("org/texts", ["org/texts"]), ("python-stdlib", None), ("a.jsonl", None)]
)
def test_card_lists_datasets_of_the_hub(
    demo_run: Path, path: str, listed: list[str] | None
) -> None:
    from huggingface_hub import ModelCard

    sae = load_sae(demo_run / "phase2")
    settings = {**sae.metadata["config"], "dataset": {"path": path}}
    card = ModelCard(model_card(Subject(sae, settings, "saelens", None)))
    assert card.data.datasets == listed


def test_card_of_a_conversion_claims_no_results(demo_run: Path, tmp_path: Path) -> None:
    export(demo_run / "phase2", tmp_path / "out", "sparsify", k=8, card=True)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "This is a conversion" in text and "do not hold for it" in text
    assert "model-index" not in text


def test_a_resumable_checkpoint_is_an_sae_too(
    demo_run: Path, tmp_path: Path, activations: torch.Tensor
) -> None:
    """Its metadata names model and site in the fingerprint only."""
    finished = read_checkpoint(demo_run / "phase1")
    identity = {"model_name": "spalf/demo-2l", "hook_point": HOOK_POINT}
    store = CheckpointStore(tmp_path / "phase1.checkpoints", identity)
    store.save(10, Checkpoint(finished.tensors, {"state": finished.metadata["state"]}))
    sae = load_sae(tmp_path / "phase1.checkpoints" / "step_000000010")
    assert (sae.model_name, sae.hook_point) == ("spalf/demo-2l", HOOK_POINT)
    assert torch.equal(sae.encode(activations), load_sae(demo_run / "phase1").encode(activations))
