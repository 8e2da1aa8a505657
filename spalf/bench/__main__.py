"""``python -m spalf.bench --out DIR``: speed and memory, side by side with SAELens in one run.

Writes ``bench.json`` after every measurement, then ``bench.md`` and ``bench.png``. Without a GPU
it measures the CPU path at the demo's size, and says so.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch

from spalf.baselines import require_saelens
from spalf.bench.contestants import SETTLING_STEPS, Timing, saelens_step, spalf_step
from spalf.bench.end_to_end import DEMO_4L, PYTHIA_410M, LMShape
from spalf.bench.end_to_end import measurements as end_to_end
from spalf.bench.floor import ceilings
from spalf.bench.problem import Shape
from spalf.bench.report import write_report

logger = logging.getLogger(__name__)

MAIN = Shape(d_model=2048, F=32_768, L0=64, batch=4096)
CPU_SHAPE = Shape(d_model=128, F=2048, L0=16, batch=1024)
LM_SHAPE = Shape(d_model=1024, F=16_384, L0=64, batch=4096)
CPU_LM_SHAPE = Shape(d_model=128, F=1024, L0=16, batch=1024)
SCALING = {
    "F": [Shape(2048, F, 64, 4096) for F in (4096, 8192, 16_384, 65_536, 131_072)],
    "d_model": [Shape(d, 32_768, 64, 4096) for d in (512, 1024, 4096)],
    "L0": [Shape(2048, 32_768, L0, 4096) for L0 in (16, 128, 512)],
    "batch": [Shape(2048, 32_768, 64, batch) for batch in (1024, 2048, 8192)],
}


def hardware(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on and with."""
    names = ("torch", "triton", "sae-lens", "transformers")
    found = {name: _version(name) for name in names}
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": chip or platform.machine(), "threads": str(torch.get_num_threads()), **found}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def measurements(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Every measurement, one record after another; the most important ones first."""
    if device.type != "cuda":
        yield from _cpu(device)
        return
    yield {"what": "ceilings", **asdict(MAIN), **ceilings(MAIN, device)}
    settle = 300 if quick else SETTLING_STEPS
    yield _record("spalf", "main", MAIN, _spalf(MAIN, device, settle))
    for method in ("jumprelu", "batchtopk", "topk"):
        for autocast in (True, False):
            name = f"saelens {method}{' autocast' if autocast else ''}"
            timing = saelens_step(method, MAIN, device, autocast=autocast, steps=30, repeats=5)
            yield _record(name, "main", MAIN, timing)
    for precision, kernel in (("float32", "auto"), ("bfloat16", "reference")):
        timing = _spalf(MAIN, device, settle, precision=precision, kernel=kernel)
        yield _record(f"spalf {precision} {kernel}", "main", MAIN, timing)
    yield from _end_to_end(PYTHIA_410M, LM_SHAPE, device, steps=128)
    for axis, shapes in SCALING.items():
        for shape in shapes[:2] if quick else shapes:
            yield _record(
                "spalf", axis, shape, _spalf(shape, device, SETTLING_STEPS if not quick else 300)
            )
            timing = saelens_step("jumprelu", shape, device, autocast=True, steps=20, repeats=3)
            yield _record("saelens jumprelu autocast", axis, shape, timing)


def _cpu(device: torch.device) -> Iterator[dict[str, Any]]:
    timing = spalf_step(CPU_SHAPE, device, steps=40, repeats=5, settle=700)
    yield _record("spalf", "cpu", CPU_SHAPE, timing)
    for method in ("jumprelu", "batchtopk", "topk"):
        timing = saelens_step(method, CPU_SHAPE, device, autocast=False, steps=40, repeats=5)
        yield _record(f"saelens {method}", "cpu", CPU_SHAPE, timing)
    yield from _end_to_end(DEMO_4L, CPU_LM_SHAPE, device, steps=16)


def _end_to_end(
    lm: LMShape, shape: Shape, device: torch.device, steps: int
) -> Iterator[dict[str, Any]]:
    for row in end_to_end(lm, shape, device, steps):
        logger.info("end to end: %s", row)
        tokens = shape.batch * row.get("cells", 1)
        yield {
            **row,
            "axis": "end to end",
            **asdict(shape),
            "tokens_per_s": tokens / row["ms"] * 1e3,
        }


def _spalf(shape: Shape, device: torch.device, settle: int, **options: str) -> Timing:
    return spalf_step(shape, device, steps=50, repeats=5, settle=settle, **options)


def _record(name: str, axis: str, shape: Shape, timing: Timing) -> dict[str, Any]:
    row = {"what": name, "axis": axis, **asdict(shape), **asdict(timing)}
    row["tokens_per_s"] = shape.batch / timing.ms * 1e3
    logger.info("%s", row)
    return row


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--quick", is_flag=True, help="Fewer shapes, shorter settling.")
@click.option("--threads", type=int, default=2, help="CPU threads.", show_default=True)
def main(out: Path, quick: bool, threads: int) -> None:
    """Measure, and write bench.json, bench.md and bench.png into OUT."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    require_saelens()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        logger.info("no GPU here: the CPU path is measured, at the size of the demo")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row in measurements(device, quick):
        rows.append(row)
        write_report(out, hardware(device), rows)


if __name__ == "__main__":
    main()
