from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from spalf import load_sae
from spalf.cli.errors import status_of
from spalf.cli.interchange import import_
from spalf.config import RunConfig
from spalf.errors import UserError
from spalf.interchange.export import export
from spalf.interchange.importing import import_sae
from spalf.report.aggregate import aggregate
from spalf.steps.context import StepContext
from spalf.steps.evaluate import evaluate


@pytest.fixture(scope="module")
def theirs(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAELens folder; its SAE computes what the demo's does."""
    out = tmp_path_factory.mktemp("theirs") / "sae"
    export(demo_run / "phase2", out, "saelens")
    return out


def as_topk(source: Path, out: Path, k: int) -> Path:
    """The same weights with another gate."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    weights = load_file(source / "sae_weights.safetensors")
    weights.pop("threshold")
    save_file(weights, out / "sae_weights.safetensors")
    config = json.loads((source / "cfg.json").read_text())
    (out / "cfg.json").write_text(json.dumps({**config, "architecture": "topk", "k": k}))
    return out


def without(source: Path, out: Path, *names: str) -> Path:
    """A copy of a SAELens folder whose metadata lacks some entries."""
    shutil.copytree(source, out)
    config = json.loads((out / "cfg.json").read_text())
    config["metadata"] = {k: v for k, v in config["metadata"].items() if k not in names}
    (out / "cfg.json").write_text(json.dumps(config))
    return out


def test_imported_saes_are_rows_of_the_frontier(
    demo_run: Path,
    demo_config: RunConfig,
    cpu_context: StepContext,
    theirs: Path,
    tmp_path: Path,
) -> None:
    places = {"same": theirs, "their-topk": as_topk(theirs, tmp_path / "topk source", 6)}
    reports = [demo_run / "evaluation.json"]
    for name, source in places.items():
        out = tmp_path / "imported" / name
        import_sae(source, out)
        assert load_sae(out).d_sae == 96
        reports.append(out / "evaluation.json")
        evaluate(demo_config, demo_run / "calibration", {"sae": out}, reports[-1], cpu_context)
    frontier, _ = aggregate(reports, tmp_path / "tables")
    table = pd.read_csv(frontier).set_index("method")
    assert set(table.index) == {"spalf", "same", "their-topk"}
    same, ours, topk = table.loc["same"], table.loc["spalf"], table.loc["their-topk"]
    for name in ("l0", "explained_variance", "ce_sae", "kl", "mse"):
        assert same[name] == pytest.approx(ours[name], rel=1e-3)
    assert same["ce_clean"] == ours["ce_clean"] and same["tokens"] == ours["tokens"]
    assert topk["l0"] == pytest.approx(6, abs=0.1)
    assert topk["ce_sae"] != ours["ce_sae"]
    assert "architecture=topk" in topk["hyperparameters"]


def test_what_was_imported_is_checked(theirs: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    import_sae(theirs, out)
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["config"]["L0_target"] == 8 and metadata["config"]["F"] == 96
    assert set(metadata["digests"]) == {"cfg.json", "sae_weights.safetensors"}
    for name in metadata["digests"]:
        assert (out / name).read_bytes() == (theirs / name).read_bytes()
    weights = bytearray((out / "sae_weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "sae_weights.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"sae_weights\.safetensors.*does not match its digest"):
        load_sae(out)


def test_l0_comes_from_the_folder_or_the_user(theirs: Path, tmp_path: Path) -> None:
    silent = without(theirs, tmp_path / "silent", "target_l0")
    with pytest.raises(UserError, match="does not say what L0 it was made for"):
        import_sae(silent, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    import_sae(silent, tmp_path / "b", l0_target=20)
    assert json.loads((tmp_path / "b" / "metadata.json").read_text())["config"]["L0_target"] == 20
    topk = as_topk(theirs, tmp_path / "topk source", 6)
    import_sae(topk, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["config"]["L0_target"] == 6


def test_faulty_imports_are_one_line(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> str:
        given = [str(argument) for argument in arguments]
        assert status_of(lambda: import_.main(given, standalone_mode=False), debug=False) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "no such file" in fails(tmp_path / "missing", tmp_path / "a")
    assert "must lie between 0 and d_sae = 96" in fails("--l0-target", 500, theirs, tmp_path / "b")
    assert "names the SAE in the tables" in fails(theirs, tmp_path / "my sae")
    assert "not spalf" in fails(theirs, tmp_path / "spalf")
    import_sae(theirs, tmp_path / "taken")
    assert "exists already" in fails(theirs, tmp_path / "taken")
    gated = shutil.copytree(theirs, tmp_path / "gated source")
    config = json.loads((theirs / "cfg.json").read_text())
    (gated / "cfg.json").write_text(json.dumps({**config, "architecture": "gated"}))
    assert "'gated'" in fails(gated, tmp_path / "gated")


def test_an_sae_of_another_site_or_width(
    demo_run: Path,
    demo_config: RunConfig,
    cpu_context: StepContext,
    theirs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = shutil.copytree(theirs, tmp_path / "elsewhere")
    config = json.loads((theirs / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.0.hook_mlp_out"
    (elsewhere / "cfg.json").write_text(json.dumps(config))
    calibration = demo_run / "calibration"
    with caplog.at_level(logging.WARNING):
        evaluate(demo_config, calibration, {"sae": elsewhere}, tmp_path / "e.json", cpu_context)
    assert "was trained at blocks.0.hook_mlp_out" in caplog.text

    from safetensors.torch import save_file

    narrow = tmp_path / "narrow"
    narrow.mkdir()
    tensors = {"W_enc": torch.zeros(32, 4), "W_dec": torch.zeros(4, 32), "b_dec": torch.zeros(32)}
    tensors |= {"b_enc": torch.zeros(4), "threshold": torch.ones(4)}
    save_file(tensors, narrow / "sae_weights.safetensors")
    (narrow / "cfg.json").write_text(json.dumps({**config, "d_in": 32, "d_sae": 4}))
    with pytest.raises(UserError, match=r"is for activations of width 32.* is 64 wide"):
        evaluate(demo_config, calibration, {"sae": narrow}, tmp_path / "n.json", cpu_context)
