"""The Triton kernels compile for a GPU, also where there is none: the interpreter cannot tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_every_kernel_compiles_as_it_is_launched_and_spills_nothing() -> None:
    """For sm_90; widths of 64 to 2048, float32 and bfloat16 operands."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers_compile"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    written = {
        name
        for source in (ROOT / "spalf/kernels").glob("triton_*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(encoding="utf-8"), re.M)
    }
    assert {launch.partition("(")[0] for launch in found} == written
    assert [launch for launch, used in found.items() if used["stack"]] == []
