"""Stands in for the ``spalf`` command: writes what each step declares, and notes the call.

Reads ``STUB_CALLS`` (a file that gets one line a call), ``STUB_FAIL`` (a step that fails),
``STUB_FAIL_AT`` (only where its output's path has this in it), ``STUB_DIVERGE`` (a cell that a pack
has no result of) and ``STUB_GPUS`` (a file that gets a line when a call begins and ends, with the
GPU it may use).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

STATE = ("model.safetensors", "tensors.safetensors", "control.safetensors", "optimizer.safetensors")
OUTPUTS = {
    "calibrate": (
        "tokens/train.npy",
        "tokens/calibration.npy",
        "tokens/evaluation.npy",
        "tokens/tokens.json",
        "calibration.safetensors",
        "metadata.json",
    ),
    "init": ("model.safetensors", "tensors.safetensors", "metadata.json"),
    "phase1": (*STATE, "metadata.json", "metrics.jsonl"),
    "phase2": (*STATE, "metadata.json", "metrics.jsonl"),
    "baseline": ("cfg.json", "sae_weights.safetensors", "metadata.json"),
    "random": ("cfg.json", "sae_weights.safetensors", "metadata.json"),
    "paper": ("numbers.json", "manuscript.typ", "paper.pdf", "provenance/paper.json"),
    "aggregate": ("frontier.csv", "phases.csv", "provenance/aggregate.json"),
    "tables": (
        *(f"{table}.{end}" for table in ("frontier", "phases") for end in ("md", "tex", "html")),
        "provenance/tables.json",
    ),
}


def leave_results_for_the_phases(arguments: list[str], out: Path) -> None:
    """What a pack leaves behind for the jobs of its cells; ``STUB_DIVERGE`` names one without."""
    cells = [Path(arguments[i + 3]) for i, word in enumerate(arguments) if word == "--cell"]
    diverged = {
        str(cell): "not finite" for cell in cells if str(cell) == os.environ.get("STUB_DIVERGE")
    }
    for cell in cells:
        for phase in ("phase1", "phase2"):
            if str(cell) not in diverged:
                kept = cell / f"{phase}.checkpoints" / "finished_0"
                kept.mkdir(parents=True, exist_ok=True)
                (kept / "metadata.json").write_text("{}", encoding="utf-8")
    out.write_text(json.dumps({"diverged": diverged}), encoding="utf-8")


def main() -> int:
    if "STUB_GPUS" not in os.environ:
        return work()
    with open(os.environ["STUB_GPUS"], "a", encoding="utf-8", buffering=1) as gpus:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus.write(f"+{gpu}\n")
        time.sleep(0.5)
        if sys.argv[1] == "init":
            wait_for_company(Path(os.environ["STUB_GPUS"]))
        status = work()
        gpus.write(f"-{gpu}\n")
    return status


def wait_for_company(log: Path) -> None:
    """Stay until ``STUB_BEGUN`` steps have begun, however slow the machine is, or for a minute."""
    for _ in range(600):
        if log.read_text(encoding="utf-8").count("+") >= int(os.environ.get("STUB_BEGUN", "0")):
            return
        time.sleep(0.1)


def work() -> int:
    step, arguments = sys.argv[1], sys.argv[2:]
    out = Path(arguments[arguments.index("--out") + 1])
    with open(os.environ["STUB_CALLS"], "a", encoding="utf-8") as calls:
        calls.write("\t".join([step, *arguments]) + "\n")
    if step in ("calibrate", "init", "phase1", "phase2", "pack", "baseline", "evaluate"):
        checkpoint = out.with_name(f"{out.stem}.checkpoints") / "step_10"
        checkpoint.mkdir(parents=True, exist_ok=True)
    if step == os.environ.get("STUB_FAIL") and os.environ.get("STUB_FAIL_AT", "") in str(out):
        sys.stderr.write("the stub was told to fail\n")
        return 1
    if step == "pack":
        leave_results_for_the_phases(arguments, out)
        return 0
    names = OUTPUTS.get(step, ())
    if step == "figures":
        models = json.loads(arguments[arguments.index("--settings") + 1])["models"]
        drawn = [f"control_{model}.{end}" for model in models for end in ("png", "pdf")]
        names = ("pareto.pdf", "pareto.png", *drawn, "provenance/figures.json")
    for path in [out / name for name in names] or [out]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
