"""A Slurm of one controller and three nodes on the loopback interface, without systemd.

Node n1 is in partition ``cpu`` (the default), n2 and n3 have two pretend GPUs each and are in
``gpu`` and ``spare``. Both are preempted by ``urgent``, which requeues jobs of the one and cancels
those of the other. The use of GPUs is not confined; all else is Slurm's own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
NODES = ("n1", "n2", "n3")
PORTS = range(17400, 32400, 400)
"""Where the ports of a cluster begin; the first block that nobody on this machine has taken."""
PATIENCE = 900
"""Seconds to wait for what must happen, on a machine that is as slow and busy as it likes."""
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def missing(needed: tuple[str, ...] = NEEDED) -> list[str]:
    """Those of the commands that are not installed."""
    return [name for name in needed if shutil.which(name, path=SEARCH_PATH) is None]


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Poll ``condition`` until it is true.

    Raises:
        TimeoutError: it was not, in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


@dataclass(frozen=True)
class Job:
    """A job as ``scontrol show job`` tells it."""

    id: str
    state: str
    comment: str
    node: str
    partition: str
    tres: str
    gpus: int
    minutes: int
    restarts: int
    reason: str

    @property
    def step(self) -> str:
        """The rule, from the comment that the executor gives its jobs."""
        found = re.match(r"rule_([a-z0-9]+)", self.comment)
        return found[1] if found else ""

    @property
    def over(self) -> bool:
        """Whether it ended, in whatever way."""
        return self.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")


class Cluster:
    """The daemons, started and stopped by their pid files.

    Attributes:
        root: configuration, state, logs and sockets; a short path, for the sockets' sake.
        index: clusters with different numbers share no job ids.
        port: the first of its ports, once started.
    """

    DAEMONS = (*NODES, "slurmctld", "munged")
    """In the order in which they are ended."""
    ACCOUNTING = "AccountingStorageType=accounting_storage/none\nMinJobAge=3600"

    def __init__(self, root: Path, index: int = 0) -> None:
        self.root, self.index = root, index
        self.port = 0
        self.host = socket.gethostname().split(".")[0]
        self.user = subprocess.check_output(["id", "-un"], text=True).strip()
        self.environment = {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": os.pathsep.join([str(root / "bin"), SEARCH_PATH]),
        }

    def start(self) -> None:
        """Boot everything and wait until all nodes are idle."""
        for name in ("bin", "state", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self._reserve_ports()
        self._configure()
        self._start_munge()
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self._node_states() == {"idle"}, "idle nodes")
        self._require_loopback()

    def _reserve_ports(self) -> None:
        """Take a block of ports for as long as this process lives."""
        for port in PORTS:
            self._ports = FileLock(Path(tempfile.gettempdir()) / f"spalf-slurm-{port}.lock")
            try:
                self._ports.acquire(timeout=0)
            except Timeout:
                continue
            self.port = port
            return
        raise RuntimeError("every block of ports is taken by another cluster")

    def stop(self) -> None:
        """End jobs and daemons; nothing that was started here is left."""
        if self._pid("slurmctld"):
            self.call("scancel", "--user", str(os.getuid()))
            wait_until(lambda: not self.call("squeue", "--noheader"), "an empty queue")
        for name in self.DAEMONS:
            self._end(name, signal.SIGTERM)
        # Processes are tracked by parentage here, and one that lost its parent escapes Slurm.
        for pid in processes_with(f"SLURM_CONF={self.environment['SLURM_CONF']}"):
            _signal(pid, signal.SIGKILL)

    def call(self, *command: str) -> str:
        """Output of a Slurm command; empty where it failed."""
        result = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    def jobs(self, of: Path) -> list[Job]:
        """All jobs submitted from the working directory ``of``, oldest first."""
        rows = self.call("scontrol", "--oneliner", "show", "jobs").splitlines()
        found = [_job(row) for row in rows if f"WorkDir={of} " in row]
        return sorted(found, key=lambda job: int(job.id))

    def start_controller(self) -> None:
        self._daemon("slurmctld")
        wait_until(lambda: "UP" in self.call("scontrol", "ping"), "slurmctld")

    def kill_controller(self) -> None:
        self._end("slurmctld", signal.SIGKILL)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)
        wait_until(lambda: self._pid(node), f"slurmd of {node}")

    def lose_node(self, node: str, job: str, *, processes_too: bool) -> None:
        """Take a node away: its slurmd, and with ``processes_too`` what it runs of ``job``."""
        self._end(node, signal.SIGKILL)
        if processes_too:
            for pid in processes_of(job):
                _signal(pid, signal.SIGKILL)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def return_node(self, node: str) -> None:
        self.start_node(node)
        self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def _configure(self) -> None:
        fake = (
            "/dev/null",
            "/dev/zero",
        )  # only character devices make Slurm set CUDA_VISIBLE_DEVICES
        gres = [f"NodeName=n[2-3] Name=gpu Type=pretend File={path}" for path in fake]
        (self.root / "gres.conf").write_text("\n".join(gres) + "\n", encoding="utf-8")
        version = subprocess.run(
            ["slurmd", "-V"], env={"PATH": SEARCH_PATH}, capture_output=True, text=True, check=True
        ).stdout.split()[1]
        major, minor = (int(part) for part in version.split(".")[:2])
        plugin = "disabled" if (major, minor) >= (23, 11) else "cgroup/v1"
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n", encoding="utf-8")
        node_check = "node_reg_mem_percent=1" if major >= 23 else "idle_on_node_suspend"
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=self.host,
                user=self.user,
                accounting=self.ACCOUNTING.format(root=self.root, database_port=self.port + 1),
                root=self.root,
                port=self.port,
                node_port=self.port + 10,
                first=self.port + 100,
                last=self.port + 299,
                node_check=node_check,
                first_job=1 + 10_000 * self.index,
                nodes="\n".join(
                    f"NodeName={node} NodeHostname={self.host} NodeAddr=127.0.0.1 "
                    f"Port={self.port + 10 + index} CPUs=2 RealMemory=8000 State=UNKNOWN"
                    + (" Gres=gpu:pretend:2" if index > 1 else "")
                    for index, node in enumerate(NODES, start=1)
                ),
            ),
            encoding="utf-8",
        )
        # The executor removes every SLURM_ variable before the srun inside a job.
        srun = self.root / "bin" / "srun"
        real = shutil.which("srun", path=SEARCH_PATH)
        conf = self.environment["SLURM_CONF"]
        srun.write_text(f"#!/bin/sh\nSLURM_CONF='{conf}' exec {real} \"$@\"\n", encoding="utf-8")
        srun.chmod(0o755)

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemon(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={self.root}/munge.socket",
            f"--pid-file={self.root}/munged.pid",
            f"--log-file={self.root}/munged.log",
            f"--seed-file={self.root}/munged.seed",
        )
        wait_until((self.root / "munge.socket").exists, "munge")

    def _daemon(self, *command: str) -> None:
        subprocess.run(
            command,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )

    def _pid(self, name: str) -> int | None:
        try:
            pid = int((self.root / f"{name}.pid").read_text())
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        return pid

    def _end(self, name: str, how: signal.Signals) -> None:
        pid = self._pid(name)
        if pid:
            _signal(pid, how)
            wait_until(lambda: _gone(pid), f"the end of {name}")
        (self.root / f"{name}.pid").unlink(missing_ok=True)

    def _node_states(self) -> set[str]:
        return set(self.call("sinfo", "--noheader", "--Node", "--format=%T").split())

    def _require_loopback(self) -> None:
        """No daemon may be reachable from outside, as it were with another host name."""
        own = {self._pid(name) for name in self.DAEMONS} - {None}
        listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout
        for line in listening.splitlines():
            pids = {int(pid) for pid in re.findall(r"pid=(\d+)", line)}
            if pids & own and not re.match(r"\S+\s+\S+\s+\S+\s+(127\.|\[::1\])", line):
                self.stop()
                raise RuntimeError(f"a daemon listens beyond loopback: {line}")


def _job(row: str) -> Job:
    def field(name: str) -> str:
        found = re.search(rf"(?:^| ){name}=(\S*)", row)
        return found[1] if found else ""

    days, _, clock = field("TimeLimit").rpartition("-")
    hours, minutes, _ = (int(part) for part in clock.split(":"))
    gpus = re.search(r" TresPer(?:Job|Node)=\S*gpu\S*?:(\d+)", row)
    return Job(
        id=field("JobId"),
        state=field("JobState"),
        comment=field("Comment"),
        node=field("NodeList"),
        partition=field("Partition"),
        tres=field("TRES") or field("ReqTRES"),
        gpus=int(gpus[1]) if gpus else 0,
        minutes=1440 * int(days or 0) + 60 * hours + minutes,
        restarts=int(field("Restarts") or 0),
        reason=field("Reason"),
    )


def freeze(job: str, program: bytes, until: Callable[[], object], what: str) -> None:
    """Stop ``program`` in ``job`` where it is until ``until()``."""
    pids = _running(job, program)
    for pid in pids:
        _signal(pid, signal.SIGSTOP)
    try:
        wait_until(until, what)
    finally:
        for pid in pids:
            _signal(pid, signal.SIGCONT)


def asked_to_end(job: str, program: bytes) -> bool:
    """Whether ``program`` in ``job``, which stands still, was sent SIGTERM."""
    return all(_has_pending(pid, signal.SIGTERM) for pid in _running(job, program))


def _running(job: str, program: bytes) -> list[int]:
    return [pid for pid in processes_of(job) if program in command_of(pid)]


def _has_pending(pid: int, number: signal.Signals) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    pending = re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    return bool(pending and int(pending[1], 16) >> (number - 1) & 1)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def processes_of(job: str) -> list[int]:
    """Processes that run inside ``job``, its slurmstepd included."""
    keepers = [
        pid
        for pid in _all_processes()
        if command_of(pid).startswith(f"slurmstepd: [{job}.".encode())
    ]
    return [*keepers, *processes_with(f"SLURM_JOB_ID={job}")]


def processes_with(variable: str) -> list[int]:
    """Processes that were started with ``NAME=value`` in their environment."""
    found = []
    for pid in _all_processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if variable.encode() in environment:
            found.append(pid)
    return found


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _gone(pid: int) -> bool:
    """Whether a process ended; one that nobody waits for counts as ended."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits as long as a credential lives, two minutes if nothing is said.
AuthInfo=socket={root}/munge.socket,cred_expire=15
CredType=cred/munge
SlurmctldPort={port}
SlurmdPort={node_port}
SrunPortRange={first}-{last}
# Bound to 127.0.0.1 instead of every interface.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=2,sched_min_interval=0
GresTypes=gpu
# Without cgroups this is what enforces memory limits.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
{accounting}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The nodes claim more than this machine has.
SlurmdParameters=config_overrides
SlurmctldParameters={node_check}
ReturnToService=2
SlurmdTimeout=300
SlurmctldTimeout=10
MessageTimeout=60
KillWait=5
FirstJobId={first_job}
{nodes}
PartitionName=cpu Nodes=n1 Default=YES MaxTime=1-00:00:00 State=UP
PartitionName=gpu Nodes=n[2-3] MaxTime=1-00:00:00 PriorityTier=1 State=UP
PartitionName=spare Nodes=n[2-3] MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=CANCEL State=UP
PartitionName=urgent Nodes=n[2-3] MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF State=UP
"""
