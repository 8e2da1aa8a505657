"""Any configuration survives YAML, and any schedule keeps its promises."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from spalf.config import RunConfig, SweepConfig, parse, parse_sweep, schedule, to_yaml
from spalf.config.io import yaml_number

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
positive = st.floats(1e-12, 1e12)
shares = st.floats(0.001, 0.999)


@st.composite
def run_settings(draw: st.DrawFn) -> dict[str, Any]:
    seq_len = draw(st.sampled_from([2, 16, 96, 128, 1024]))
    batch_size = seq_len * draw(st.integers(1, 64))
    F = draw(st.integers(2, 10**6))
    return {
        "model_name": draw(names),
        "hook_point": draw(names),
        "dataset": draw(st.one_of(names, st.fixed_dictionaries({"path": names, "name": names}))),
        "F": F,
        "L0_target": draw(st.floats(1e-3, F, exclude_max=True)),
        "R2_target": draw(shares),
        "lr": draw(st.floats(1e-12, 1.0)),
        "total_tokens": batch_size * draw(st.integers(10, 10**6)) + draw(st.integers(0, 99)),
        "batch_size": batch_size,
        "seq_len": seq_len,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "checkpoint": draw(st.none() | names),
        "evaluate": {
            "tokens": draw(st.integers(1, 10**9)),
            "sweep_factors": draw(st.lists(positive, max_size=4)),
        },
        "method": {
            "controller": draw(st.sampled_from(["adrc", "pi", "gradient_ascent"])),
            "v_cap": draw(st.none() | st.integers(1, F - 1)),
            "phase2_fraction": draw(st.floats(0, 0.9)),
            "l0_schedule": draw(st.booleans()),
        },
        "constants": {"kappa": draw(st.floats(1, 1e6)), "delta_cov": draw(shares)},
        "runtime": {"threads": draw(st.none() | st.integers(1, 64))},
    }


@given(run_settings())
def test_a_run_survives_yaml(settings: dict[str, Any]) -> None:
    config = parse(RunConfig, settings, "f")
    again = parse(RunConfig, yaml.safe_load(to_yaml(config)), "f")
    assert again == config
    assert to_yaml(again) == to_yaml(config)


TARGETS = st.lists(
    st.floats(0.5, 1.5), min_size=1, max_size=3, unique_by=lambda target: f"{target:g}"
)


@given(run_settings(), TARGETS)
def test_a_sweep_survives_yaml(settings: dict[str, Any], targets: list[float]) -> None:
    train = {k: settings[k] for k in ("F", "lr", "total_tokens", "batch_size", "seq_len")}
    sweep = parse_sweep(
        {
            "models": {"m.1": {"model_name": "a", "hook_point": "b", "train": {"lr": 0.5}}},
            "dataset": settings["dataset"],
            "grid": {"L0_target": targets},
            "train": train,
            "constants": settings["constants"],
        },
        "f",
    )
    again = parse_sweep(yaml.safe_load(to_yaml(sweep)), "f")
    assert again == sweep
    assert isinstance(again, SweepConfig)
    assert all(sweep.run_config(cell).lr == 0.5 for cell in sweep.cells())


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_spelt_as_yaml_reads_them(value: float) -> None:
    assert yaml.safe_load(yaml_number(value)) == value


@given(run_settings())
def test_a_schedule_keeps_its_promises(settings: dict[str, Any]) -> None:
    config = parse(RunConfig, settings, "f")
    plan = schedule(config)
    assert plan.total_steps * config.batch_size <= config.total_tokens
    per_step = plan.phase2_sequences * config.seq_len
    end_to_end = (plan.total_steps - plan.phase1_steps) * config.batch_size
    assert end_to_end - per_step < plan.phase2_steps * per_step <= end_to_end
    assert per_step <= config.batch_size
    assert plan.phase1_steps >= 1
    assert plan.l0_ramp_steps + plan.cooldown_steps <= plan.phase1_steps + 1
    assert plan.block_tokens % (2 * config.batch_size) == 0
    assert plan.block_tokens >= 2 * config.batch_size
    assert 0 < plan.l0_start_limit <= config.F / 2
    assert 1 <= plan.ortho_features <= config.F
    # Averages keep a positive share of the past, and the observer is stable.
    assert 0 < 1 - 10 * plan.omega_c < 1 - plan.omega_c < 1
    assert 0 < plan.omega_o < 1
