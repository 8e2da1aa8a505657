"""A live Slurm, and clones of the repository in which a small sweep is run through it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from filelock import FileLock

from tests.slurm.accounting import NEEDED, AccountedCluster
from tests.slurm.cluster import PATIENCE, Cluster, Job, missing, wait_until

ROOT = Path(__file__).parents[2]
SHORTER: dict[str, Any] = {
    "methods": ["spalf"],
    "grid": {"L0_target": [4], "seed": [0]},
    "train": {"F": 64, "lr": 0.004, "total_tokens": 786432, "batch_size": 512, "seq_len": 64},
    "evaluate": {"tokens": 8192, "sweep_tokens": 2048, "absorption": False},
    # `auto` asks Slurm for a GPU and, the GPUs being pretended, computes on the CPU.
    "runtime": {"device": "auto", "threads": 1, "checkpoint_every_steps": 100},
}
"""What is changed of the demo's configuration."""
CELL = "results/demo-2l/L0_4/seed_0"
OTHER = "results/demo-4l/L0_4/seed_0"
TRAINED = ("phase1", "phase2", "evaluation.json", "logs", "benchmarks")
"""What of a finished cell a clone is to make itself."""


@pytest.fixture(scope="session")
def cluster(worker_id: str) -> Iterator[Cluster]:
    """Slurm, one for each worker."""
    if os.environ.get("SPALF_TEST_SLURM") != "1":
        pytest.skip("boots a Slurm: run make test-slurm")
    if missing():
        pytest.skip(f"not installed: {', '.join(missing())} (Debian: slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as their user, which takes root")
    with booted(Cluster, number(worker_id)) as running:
        yield running


@pytest.fixture
def accounted(cluster: Cluster, worker_id: str) -> Iterator[AccountedCluster]:
    """Slurm with accounting, for one test."""
    if missing(NEEDED):
        needed = "slurmdbd mariadb-server-core mariadb-client-core"
        pytest.skip(f"not installed: {', '.join(missing(NEEDED))} (Debian: {needed})")
    with booted(AccountedCluster, 10 + number(worker_id)) as running:
        yield running


def number(worker_id: str) -> int:
    """Of a worker, from 0."""
    return int(worker_id.removeprefix("gw").replace("master", "0"))


AnyCluster = TypeVar("AnyCluster", bound=Cluster)


@contextmanager
def booted(kind: type[AnyCluster], index: int) -> Iterator[AnyCluster]:
    """A cluster in a directory whose path is short, because those of sockets must be."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    directory.chmod(0o755)
    name = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
    reaper = subprocess.Popen(
        [sys.executable, "-m", "tests.slurm.reaper", name, str(directory), str(index)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    running = kind(directory, index)
    try:
        running.start()
        yield running
    finally:
        reaper.communicate()
    assert reaper.returncode == 0


def shortened_demo() -> dict[str, Any]:
    """The grid that ``snakemake`` runs in a fresh clone, cut down to a cell of each model."""
    demo = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    models = {
        name: {key: entry[key] for key in ("model_name", "hook_point")}
        for name, entry in demo["models"].items()
    }
    models["demo-4l"]["train"] = {"total_tokens": 98304}  # the faults are done to the other
    return {**demo, "models": models, **SHORTER}


def of_one_model(*l0_targets: int) -> dict[str, Any]:
    """The same, of the first model only, with other sparsities."""
    sweep = shortened_demo()
    return {
        **sweep,
        "models": {"demo-2l": sweep["models"]["demo-2l"]},
        "grid": {"L0_target": list(l0_targets), "seed": [0]},
    }


class Clone:
    """A clone of the repository in a path with a space, its environment inside, as users have it.

    Args:
        parent: directory to make it in.
        cluster: where its jobs go; none for this machine.
        sweep: its ``config/config.yaml``; by default the shortened demo.

    Attributes:
        path: the clone.
        finished: inode of each finished result.
        remade: those that were other files later.
    """

    def __init__(
        self, parent: Path, cluster: Cluster | None, sweep: dict[str, Any] | None = None
    ) -> None:
        self.path = parent / "a clone"
        self._cluster = cluster
        if not self.path.exists():
            self._make(sweep or shortened_demo())
        self.finished: dict[Path, int] = {}
        self.remade: set[Path] = set()
        self._watching = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _make(self, sweep: dict[str, Any]) -> None:
        self.path.mkdir(parents=True)
        for name in ("Snakefile", "environment.yml"):
            shutil.copy(ROOT / name, self.path)
        for name in ("spalf", "workflow", "config"):
            shutil.copytree(ROOT / name, self.path / name, symlinks=True)
        for name in ("slurm", "profiles"):
            shutil.copy(ROOT / name, self.path / name, follow_symlinks=False)
        self._make_environment()
        (self.path / "config/config.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
        self._set_site()

    def _make_environment(self) -> None:
        """A ``.venv`` with this package and what the one that runs the tests has."""
        home = self.path / ".venv"
        venv.create(home, symlinks=True)
        packages = sysconfig.get_path("purelib")
        added = Path(sysconfig.get_path("purelib", vars={"base": str(home)})) / "packages.pth"
        added.write_text(
            f"{self.path}\nimport site; site.addsitedir({packages!r})\n", encoding="utf-8"
        )
        for name, module in (("snakemake", "snakemake.cli"), ("spalf", "spalf.cli.main")):
            script = home / "bin" / name
            # What pip writes where a #! line cannot hold the path.
            text = f"#!/bin/sh\n'''exec' \"{home}/bin/python\" \"$0\" \"$@\"\n' '''\n"
            script.write_text(f"{text}from {module} import main\nmain()\n", encoding="utf-8")
            script.chmod(0o755)

    def _set_site(self) -> None:
        """Uncomment the partition, as a site would; ask for states more often than it should."""
        self.edit_profile("# slurm_partition: gpu ", "slurm_partition: gpu ")
        self.edit_profile("status-checks: 40", "status-checks: 2")

    def edit_profile(self, old: str, new: str) -> None:
        profile = self.path / "slurm" / "config.yaml"
        text = profile.read_text(encoding="utf-8")
        assert old in text
        profile.write_text(text.replace(old, new), encoding="utf-8")

    def set_resources(self, **resources: object) -> None:
        """Give every training step these resources in the site's block."""
        block = {step: resources for step in ("calibrate", "init", "phase1", "phase2", "evaluate")}
        with (self.path / "slurm" / "config.yaml").open("a", encoding="utf-8") as profile:
            profile.write("\n" + yaml.safe_dump({"set-resources": block}))

    def continue_from(
        self, other: Clone, *, without: tuple[str, ...] = TRAINED, of: tuple[str, ...] = (CELL,)
    ) -> None:
        """Take over the results of ``other``, but for what ``without`` names of the cells ``of``.

        What was made of all cells is left out too.
        """
        shutil.copytree(other.path / ".snakemake" / "metadata", self.path / ".snakemake/metadata")
        cells = [str(other.path / cell) for cell in of]
        for name in ("demo-2l", "demo-4l"):
            shutil.copytree(
                other.path / "results" / name,
                self.path / "results" / name,
                ignore=lambda folder, names: without if str(folder) in cells else (),
            )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start ``snakemake``; what it says goes to ``snakemake.<n>.log`` in the clone."""
        command = ["env", "--default-signal=INT,HUP", "snakemake", *arguments]
        with self._log(len(self._processes)).open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**self.environment(), **environment},
            )
        self._processes.append(process)
        return process

    def environment(self) -> dict[str, str]:
        """Variables of a shell in which the clone's environment and the cluster are at hand."""
        extra = self._cluster.environment if self._cluster else {}
        found = {**os.environ, **extra, "PYTHONDONTWRITEBYTECODE": "1"}
        found.pop("PYTHONPATH", None)
        found["PATH"] = os.pathsep.join([str(self.path / ".venv/bin"), found["PATH"]])
        return found

    def sweep(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start the user's command: ``snakemake --profile slurm``."""
        return self.start("--profile", "slurm", *arguments, **environment)

    def said(self) -> str:
        """Everything snakemake printed so far."""
        logs = [self._log(index) for index in range(len(self._processes))]
        return "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)

    def jobs(self, step: str = "") -> list[Job]:
        assert self._cluster
        return [job for job in self._cluster.jobs(self.path) if not step or job.step == step]

    def wait_for_training(self, after: int = 0) -> Job:
        """Wait until a Phase 1 job runs and has written a checkpoint past step ``after``."""
        checkpoints = self.path / CELL / "phase1.checkpoints"

        def training() -> bool:
            steps = [int(path.name[5:]) for path in checkpoints.glob("step_*")]
            over = all(process.poll() is not None for process in self._processes)
            return over or (max(steps, default=0) > after and bool(self._running()))

        wait_until(training, f"training past step {after}")
        assert self._running(), self.said()
        return self._running()[0]

    def _running(self) -> list[Job]:
        return [job for job in self.jobs("phase1") if job.state == "RUNNING"]

    def text(self, path: str) -> str:
        return (self.path / path).read_text(encoding="utf-8")

    def frontier(self) -> bytes:
        return (self.path / "results/tables/frontier.csv").read_bytes()

    def end(self) -> None:
        """Stop watching; kill what is left of snakemake."""
        self._watching.set()
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _log(self, index: int) -> Path:
        return self.path / f"snakemake.{index}.log"

    def _watch(self) -> None:
        """Note when a finished result is replaced: its step ran twice."""
        patterns = ("init/metadata.json", "phase?/metadata.json", "evaluation.json")
        while not self._watching.wait(0.05):
            for pattern in patterns:
                for path in self.path.glob(f"results/*/L0_*/seed_0/{pattern}"):
                    self._note(path)

    def _note(self, path: Path) -> None:
        try:
            inode = path.stat().st_ino
            if path not in self.finished:  # the link keeps the number from being used again
                (self.path / f"seen.{len(self.finished)}").hardlink_to(path)
        except OSError:  # deleted since; a step that finds it kept puts the same file back
            return
        if self.finished.setdefault(path, inode) != inode:
            self.remade.add(path)


@pytest.fixture(scope="session")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """The shortened demo, run on this machine without Slurm and without disturbance."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first worker to come makes it for all of them
        shared = shared.parent
    with FileLock(shared / "reference.lock"):
        made = (shared / "reference").exists()
        clone = Clone(shared / "reference", None)
        if not made:
            process = clone.start("--resources", "gpu=2")  # both models at once
            assert process.wait(PATIENCE) == 0, clone.said()
    yield clone
    clone.end()


@pytest.fixture
def clone(cluster: Cluster, reference: Clone, tmp_path: Path) -> Iterator[Clone]:
    """A clone in the middle of the sweep: one cell is done, one is initialised and trains next."""
    result = Clone(tmp_path, cluster)
    result.continue_from(reference)
    yield result
    result.end()
    for job in result.jobs():
        if job.state in ("RUNNING", "PENDING", "COMPLETING"):
            cluster.call("scancel", job.id)
