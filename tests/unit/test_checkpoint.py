"""Checkpoint files and the store: all or nothing, digests, the newest sound one (I10)."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spalf.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    CheckpointStore,
    files,
    fingerprint,
    read_checkpoint,
    write_checkpoint,
)
from spalf.checkpoint.files import read_metadata, sha256
from spalf.errors import UserError

STEMS = ("model", "tensors", "control", "optimizer")


def sample(value: float = 0.0) -> Checkpoint:
    """Every dtype a run stores, with the values that formats tend to lose."""
    special = torch.tensor([1 / 3, -0.0, float("nan"), float("inf"), 1e-45, value])
    tensors: dict[str, dict[str, torch.Tensor]] = {
        stem: {"a": special + 0.0, "b": special.double(), "n": torch.tensor(2**40)}
        for stem in STEMS
    }
    tensors["control"]["scalar"] = torch.tensor(0.1, dtype=torch.float64)
    tensors["model"]["transposed"] = torch.arange(6.0).view(2, 3).T
    return Checkpoint(tensors, {"state": {"step": 7, "history": [[1, 0.1, -2.5]]}, "λ": "ΔCE"})


def same(one: Checkpoint, two: Checkpoint) -> bool:
    pairs = [
        (tensor, two.tensors[stem][name])
        for stem, tensors in one.tensors.items()
        for name, tensor in tensors.items()
    ]
    return one.tensors.keys() == two.tensors.keys() and all(
        a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_i10_files_give_back_every_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", sample())
    again = read_checkpoint(tmp_path / "c")
    assert same(sample(), again)
    assert again.metadata["state"] == sample().metadata["state"]
    assert again.metadata["λ"] == "ΔCE"
    assert again.metadata["format_version"] == FORMAT_VERSION


def test_five_files_and_a_digest_of_each(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", sample())
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {f"{stem}.safetensors" for stem in STEMS} | {"metadata.json"}
    digests = read_metadata(tmp_path / "c")["digests"]
    assert digests == {name: sha256(tmp_path / "c" / name) for name in names - {"metadata.json"}}
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "nothing temporary is left"


def test_only_the_files_asked_for_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", sample())
    (tmp_path / "c" / "optimizer.safetensors").unlink()
    assert set(read_checkpoint(tmp_path / "c", stems=("model",)).tensors) == {"model"}


def test_views_that_share_storage_are_written(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    shared = Checkpoint({"model": {"whole": whole, "part": whole[2:5]}}, {})
    write_checkpoint(tmp_path / "c", shared)
    assert same(shared, read_checkpoint(tmp_path / "c"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "empty": empty,
    "bit-flipped": flip_a_bit,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", [*(f"{stem}.safetensors" for stem in STEMS), "metadata.json"])
def test_damage_to_any_file_is_noticed_and_the_file_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    write_checkpoint(tmp_path / "c", sample())
    damage(tmp_path / "c" / name)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as raised:
        read_checkpoint(tmp_path / "c")
    assert "\n" not in str(raised.value)


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(files, "FORMAT_VERSION", 99)
        write_checkpoint(tmp_path / "c", sample())
    with pytest.raises(UserError, match=f"has checkpoint format 99, not {FORMAT_VERSION}"):
        read_checkpoint(tmp_path / "c")


def test_a_changed_number_in_the_metadata_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", sample())
    path = tmp_path / "c" / "metadata.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(UserError, match="does not match its digest"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("fails_at", range(3))
def test_a_failing_write_leaves_the_old_checkpoint_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    write_checkpoint(tmp_path / "c", sample(1.0))
    before, calls = contents(tmp_path / "c"), 0
    original = files.save_file

    def full_disk(tensors: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise OSError(28, "No space left on device", str(path))
        original(tensors, path)

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "c", sample(2.0))
    assert contents(tmp_path / "c") == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_write_cut_short_while_moving_is_never_read_as_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-replaced files of an existing directory are noticed; metadata.json comes last."""
    write_checkpoint(tmp_path / "c", sample(1.0))
    original, moved = Path.replace, 0

    def stops(self: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        if moved == 3:
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "c", sample(2.0))
    assert not (tmp_path / "c" / "metadata.json").exists(), "its presence means complete"
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "c")


def test_a_directory_that_exists_already_is_filled(tmp_path: Path) -> None:
    """Snakemake makes the directories of declared outputs; other files in them stay."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").write_text("{}\n")
    write_checkpoint(tmp_path / "c", sample())
    write_checkpoint(tmp_path / "c", sample(3.0))
    assert same(sample(3.0), read_checkpoint(tmp_path / "c"))
    assert (tmp_path / "c" / "metrics.jsonl").exists()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store", fingerprint({"lr": 0.1}, {"init": "abc"}))


def steps_kept(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name[5:]) for path in store.directory.glob("step_*"))


def value_of(checkpoint: Checkpoint | None) -> float:
    assert checkpoint is not None
    return float(checkpoint.tensors["model"]["a"][-1])


def test_store_keeps_the_last_two(store: CheckpointStore) -> None:
    assert store.latest("cpu") is None
    for step in (50, 100, 1000, 20_000):
        store.save(step, sample(float(step)))
    assert steps_kept(store) == [1000, 20_000]
    assert value_of(store.latest("cpu")) == 20_000
    store.clear()
    assert store.latest("cpu") is None


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "metadata.json"])
def test_store_falls_back_to_the_previous_sound_checkpoint(
    store: CheckpointStore,
    name: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.save(1, sample(1.0))
    store.save(2, sample(2.0))
    damage(store.directory / "step_000000002" / name)
    with caplog.at_level(logging.WARNING):
        assert value_of(store.latest("cpu")) == 1.0
    assert "step_000000002" in caplog.text


def test_store_ignores_leftovers_and_empty_directories(store: CheckpointStore) -> None:
    store.save(1, sample(1.0))
    (store.directory / "step_000000005").mkdir()
    shutil.copytree(store.directory / "step_000000001", store.directory / ".step_000000009.1.tmp")
    assert value_of(store.latest("cpu")) == 1.0


@pytest.mark.parametrize(
    ("settings", "inputs", "differing"),
    [
        ({"lr": 0.2}, {"init": "abc"}, "lr (0.1 there, 0.2 here)"),
        ({"lr": 0.1}, {"init": "xyz"}, "input.init ('abc' there, 'xyz' here)"),
        ({"lr": 0.1}, {"init": "abc", "more": 1}, "input.more (None there, 1 here)"),
    ],
)
def test_checkpoints_of_another_run_are_never_loaded(
    store: CheckpointStore,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    inputs: dict[str, Any],
    differing: str,
) -> None:
    store.save(5, sample(5.0))
    identity = fingerprint(settings, inputs)
    with pytest.raises(UserError) as raised:
        CheckpointStore(store.directory, identity).latest("cpu")
    assert f"belongs to another run: {differing}" in str(raised.value)
    assert value_of(store.latest("cpu")) == 5.0
    with caplog.at_level(logging.WARNING):
        assert CheckpointStore(store.directory, identity, "restart").latest("cpu") is None
    assert differing in caplog.text


def test_checkpoints_of_another_run_do_not_push_out_our_own(store: CheckpointStore) -> None:
    other = CheckpointStore(store.directory, fingerprint({"lr": 0.2}, {}))
    other.save(900, sample(9.0))
    other.save(1000, sample(10.0))
    fresh = CheckpointStore(store.directory, store.identity, "restart")
    assert fresh.latest("cpu") is None
    fresh.save(100, sample(1.0))
    assert value_of(fresh.latest("cpu")) == 1.0


def test_a_damaged_later_checkpoint_does_not_push_out_a_new_one(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        store.save(step, sample(float(step)))
    for step in (2, 3):
        truncate(store.directory / f"step_{step:09d}" / "model.safetensors")
    store.save(1, sample(1.5))
    assert value_of(store.latest("cpu")) == 1.5


def test_fingerprint_does_not_depend_on_the_order_of_settings() -> None:
    one = fingerprint({"a": 1, "b": {"c": 2, "d": 3}}, {"x": "1", "y": "2"})
    assert one == fingerprint({"b": {"d": 3, "c": 2}, "a": 1}, {"y": "2", "x": "1"})
    assert one != fingerprint({"a": 1, "b": {"c": 2, "d": 4}}, {"x": "1", "y": "2"})
    assert json.loads(json.dumps(one)) == one, "it must survive metadata.json"
