"""Start a step: say where it runs, give it a GPU, become its process.

Example: python launch.py --gpu-locks .snakemake/gpus --at-once 4 spalf phase1 --config run.yaml

On a machine with several GPUs and no scheduler that assigns them, the step gets the first that no
other step holds. Where more steps run at once than there are GPUs, each GPU takes its share of
them, a second one when all have one. The lock is kept, through `exec`, by the step's own process,
so that it goes with the process however that ends.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

POLL_SECONDS = 1.0


def visible_gpus() -> list[str]:
    """GPUs this process may use, as CUDA names them, in order."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(rows))]


def take_one(gpus: list[str], locks: Path, at_once: int) -> str:
    """Wait until one of ``gpus`` has a place and lock that until this process ends."""
    locks.mkdir(parents=True, exist_ok=True)
    slots = range(math.ceil(at_once / len(gpus)))
    while True:
        for slot, gpu in itertools.product(slots, gpus):
            name = gpu.replace("/", "_") + (f".{slot}" if slot else "")
            descriptor = os.open(locks / name, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            os.set_inheritable(descriptor, True)
            return gpu
        time.sleep(POLL_SECONDS)


def place() -> str:
    """Where this process runs, in the words that `spalf status` looks for."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"job {os.environ.get('SLURM_JOB_ID', '-')} on {node}"


def main() -> None:
    """Replace this process by the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu-locks", type=Path, help="directory of locks; take one GPU")
    parser.add_argument("--at-once", type=int, default=1, help="steps on all GPUs at a time")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    gpus = visible_gpus() if arguments.gpu_locks and "SLURM_JOB_ID" not in os.environ else []
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = take_one(gpus, arguments.gpu_locks, arguments.at_once)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    sys.stdout.write(place() + (f", GPU {given}\n" if given else "\n"))
    sys.stdout.flush()
    os.execvp(arguments.command[0], arguments.command)


if __name__ == "__main__":
    main()
