"""What the workflow runs, and what it leaves alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import ROOT, SMALL, Sweep

REPORT = {"aggregate": 1, "tables": 1, "figures": 1}
CELL_STEPS = ("init", "phase1", "phase2", "evaluate")


def test_demo_grid_has_every_rule_once_per_cell(sweep: Sweep) -> None:
    demo = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    (sweep.directory / "config.yaml").write_text(yaml.safe_dump(demo), encoding="utf-8")
    expected = {"calibrate": 2, **dict.fromkeys(CELL_STEPS, 6)}
    expected |= {"random": 6, "evaluate_baseline": 6}
    assert sweep.planned() == {**expected, **REPORT}


def test_every_step_ran_once_and_got_its_files(finished_once: Sweep) -> None:
    calls = finished_once.calls()
    steps = [call[0] for call in calls]
    assert {step: steps.count(step) for step in steps} == {
        "calibrate": 1,
        **dict.fromkeys(CELL_STEPS, 2),
        **REPORT,
    }
    evaluate = next(call for call in calls if call[0] == "evaluate" and "L0_8" in call[-1])
    options = dict(zip(evaluate[1::2], evaluate[2::2], strict=True))
    cell = "results/tiny/L0_8/seed_0"
    assert options.pop("--runtime") == '{"device":"cpu"}'
    assert json.loads(options.pop("--settings"))["L0_target"] == 8
    assert options == {
        "--if-locked": "wait",
        "--if-foreign": "restart",
        "--model": "tiny",
        "--calibration": "results/tiny/calibration",
        "--phase1": f"{cell}/phase1",
        "--phase2": f"{cell}/phase2",
        "--out": f"{cell}/evaluation.json",
    }


def test_tables_and_figures_are_told_what_calls_them(finished_once: Sweep) -> None:
    """For the record of provenance; it travels in the resources, so it reruns nothing."""
    calls = {call[0]: call for call in finished_once.calls()}
    for rule in REPORT:
        call = calls[rule]
        said = json.loads(call[call.index("--workflow") + 1])
        assert (said["rule"], said["configfiles"]) == (rule, ["config.yaml"])
        assert said["settings"]["grid"]["L0_target"] == [4, 8]


def test_logs_and_benchmarks_lie_beside_the_cell(finished_once: Sweep) -> None:
    cell = finished_once.directory / "results/tiny/L0_4/seed_0"
    for step in CELL_STEPS:
        assert (cell / "logs" / f"{step}.log").exists()
        assert (cell / "benchmarks" / f"{step}.tsv").exists()


def test_second_run_does_nothing(finished: Sweep) -> None:
    result = finished.run()
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout


def test_new_l0_target_adds_only_its_cells(finished: Sweep) -> None:
    finished.configure(grid={"L0_target": [4, 8, 16]})
    assert finished.planned() == {**dict.fromkeys(CELL_STEPS, 1), **REPORT}


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime": {"checkpoint_every_minutes": 1.5, "threads": 2, "kernel": "reference"}},
        {"runtime": {"device": "auto"}},
        {"train": {"R2_target": 0.99}},  # the default, written down
        {"models": {"tiny": {**SMALL["models"]["tiny"], "dtype": "float32"}}},
    ],
    ids=["execution", "device", "written default", "written model default"],
)
def test_what_does_not_change_the_result_reruns_nothing(
    finished: Sweep, changes: dict[str, dict[str, object]]
) -> None:
    finished.configure(**changes)
    assert finished.planned() == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluate": {"tokens": 4096}}, {"evaluate": 2, **REPORT}),
        ({"train": {"lr": 1e-3}}, {"phase1": 2, "phase2": 2, "evaluate": 2, **REPORT}),
        ({"train": {"F": 512}}, {**dict.fromkeys(CELL_STEPS, 2), **REPORT}),
        ({"dataset": "other"}, {"calibrate": 1, **dict.fromkeys(CELL_STEPS, 2), **REPORT}),
    ],
    ids=["evaluation", "learning rate", "dictionary size", "dataset"],
)
def test_a_setting_reruns_the_steps_that_depend_on_it(
    finished: Sweep, changes: dict[str, object], expected: dict[str, int]
) -> None:
    finished.configure(**changes)
    assert finished.planned() == expected


def test_deleted_evaluation_reruns_it_and_the_report(finished: Sweep) -> None:
    (finished.directory / "results/tiny/L0_4/seed_0/evaluation.json").unlink()
    assert finished.planned() == {"evaluate": 1, **REPORT}


def test_baselines_add_their_cells_and_change_no_other(finished: Sweep) -> None:
    finished.configure(methods=["spalf", "batchtopk", "topk", "jumprelu"])
    assert finished.planned() == {"baseline": 6, "evaluate_baseline": 6, **REPORT}
    finished.configure(methods=["spalf", "topk"], baselines={"lrs": [1e-3, 2e-3, 3e-3]})
    result = finished.run("--quiet", "all")
    assert result.returncode == 0, result.stdout
    calls = [c for c in finished.calls() if "--out" in c and "topk/L0_8" in c[c.index("--out") + 1]]
    assert [call[0] for call in calls] == ["baseline", "evaluate"]
    options = [dict(zip(call[1::2], call[2::2], strict=True)) for call in calls]
    assert json.loads(options[0]["--settings"])["baselines"] == {"lrs": [1e-3, 2e-3, 3e-3]}
    assert options[0]["--method"] == "topk"
    assert options[1]["--sae"] == options[0]["--out"] == "results/tiny/topk/L0_8/seed_0/baseline"
    assert options[1]["--model"] == "tiny"
    assert "baselines" not in json.loads(options[1]["--settings"])
    # SPALF's own steps do not depend on the baselines' settings.
    finished.configure(methods=["spalf", "topk"], baselines={"lrs": [1e-3]})
    assert finished.planned() == {"baseline": 2, "evaluate_baseline": 2, **REPORT}


def test_seeds_may_take_the_learning_rate_of_the_first(sweep: Sweep) -> None:
    """They wait for it and are told where it is."""
    lrs = {"lrs": [1e-3, 2e-3, 3e-3], "tried_by": "first_seed"}
    grid = {"L0_target": [8], "seed": [3, 1]}
    sweep.configure(methods=["topk"], grid=grid, baselines=lrs)
    result = sweep.run("--quiet", "all")
    assert result.returncode == 0, result.stdout
    first, second = (call for call in sweep.calls() if call[0] == "baseline")
    place = "results/tiny/topk/L0_8/seed_{}/baseline"
    assert first[first.index("--out") + 1] == place.format(3)
    assert "--rate-of" not in first
    assert second[second.index("--rate-of") + 1] == place.format(3)
    assert second[second.index("--out") + 1] == place.format(1)


def test_random_saes_are_evaluated_like_baselines_and_cost_what_init_costs(
    finished: Sweep,
) -> None:
    finished.configure(methods=["spalf", "random"])
    assert finished.planned() == {"random": 2, "evaluate_baseline": 2, **REPORT}
    result = finished.run("--quiet", "all")
    assert result.returncode == 0, result.stdout
    out = "results/tiny/random/L0_8/seed_0/baseline"
    (made,) = [call for call in finished.calls() if call[0] == "random" and out in call]
    options = dict(zip(made[1::2], made[2::2], strict=True))
    given = json.loads(options["--settings"])
    assert given["L0_target"] == 8 and "lr" not in given and "baselines" not in given
    (measured,) = [call for call in finished.calls() if call[0] == "evaluate" and out in call]
    assert dict(zip(measured[1::2], measured[2::2], strict=True))["--sae"] == out
    # It depends on none of what a trained SAE depends on.
    finished.configure(methods=["spalf", "random"], train={"lr": 0.5})
    planned = finished.planned()
    assert "random" not in planned and planned["phase1"] == 2


def test_baselines_alone_need_no_phase(sweep: Sweep) -> None:
    sweep.configure(methods=["batchtopk"])
    expected = {"calibrate": 1, "baseline": 2, "evaluate_baseline": 2, **REPORT}
    assert sweep.planned() == expected


def test_variants_are_trained_beside_the_method(finished: Sweep) -> None:
    variants = {"no-capu": {"method": {"capu": False}}}
    finished.configure(variants=variants)
    assert finished.planned() == {**dict.fromkeys(CELL_STEPS, 2), **REPORT}
    result = finished.run("--quiet", "all")
    assert result.returncode == 0, result.stdout
    place = "results/tiny/no-capu/L0_8/seed_0"
    calls = [c for c in finished.calls() if "--out" in c and place in c[c.index("--out") + 1]]
    assert [call[0] for call in calls] == list(CELL_STEPS)
    options = [dict(zip(call[1::2], call[2::2], strict=True)) for call in calls]
    assert json.loads(options[1]["--settings"])["method"] == {"capu": False}
    assert {given["--calibration"] for given in options} == {"results/tiny/calibration"}
    assert (options[3]["--model"], options[3]["--variant"]) == ("tiny", "no-capu")


def test_a_variant_that_changes_calibration_gets_its_own(finished: Sweep) -> None:
    finished.configure(variants={"no-whitening": {"method": {"whitening": False}}})
    expected = {"calibrate": 1, **dict.fromkeys(CELL_STEPS, 2), **REPORT}
    assert finished.planned() == expected
    result = finished.run("--dry-run", "--printshellcmds")
    assert "--calibration results/tiny/no-whitening/calibration" in result.stdout


def test_reformatted_rule_reruns_nothing(edited: Sweep) -> None:
    rules = edited.source / "workflow/rules/train.smk"
    text = rules.read_text(encoding="utf-8")
    assert "spalf phase1 --settings" in text
    rules.write_text(text.replace("spalf phase1 --settings", "spalf  phase1  --settings"))
    assert edited.planned() == {}


def test_revision_reruns_the_step_and_what_follows(edited: Sweep) -> None:
    steps = edited.source / "workflow/steps.py"
    text = steps.read_text(encoding="utf-8")
    raised, changes = re.subn(r'"phase2": \d+,', '"phase2": 99,', text)
    assert changes == 1
    steps.write_text(raised, encoding="utf-8")
    assert edited.planned() == {"phase2": 2, "evaluate": 2, **REPORT}


def test_checkpoints_outlive_a_failure_and_go_on_success(sweep: Sweep) -> None:
    cell = sweep.directory / "results/tiny/L0_4/seed_0"
    target = "results/tiny/L0_4/seed_0/evaluation.json"
    failed = sweep.run("--", target, STUB_FAIL="phase2")
    assert failed.returncode == 1
    assert "the stub was told to fail" in failed.stdout  # the log of a failed step is shown
    assert (cell / "phase1.checkpoints").exists()
    assert (cell / "phase2.checkpoints").exists()
    assert sweep.run("--quiet", "all", "--", target).returncode == 0
    assert not list((sweep.directory / "results").rglob("*.checkpoints"))


def test_config_on_the_command_line_is_typed(finished: Sweep) -> None:
    grid = 'grid={"L0_target": [4], "seed": [0, 1]}'
    assert finished.planned("--config", grid) == {**dict.fromkeys(CELL_STEPS, 1), **REPORT}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"learning_rate": 1}}, ("train.learning_rate", "unknown key")),
        ({"train": {"lr": "3e-4"}}, ("train.lr", "3e-4", "0.0003")),
        ({"grid": {"L0_target": [4, 256]}}, ("L0_target", "256", "below F")),
        ({"models": {"tiny": {"model_name": "x"}}}, ("models.tiny.hook_point", "missing")),
        ({"models": {"a b": SMALL["models"]["tiny"]}}, ("a b",)),
        ({"methods": ["spalf", "batch-topk"]}, ("methods", "did you mean 'batchtopk'")),
        ({"variants": {"topk": {}}}, ("variant", "topk", "another name")),
        ({"variants": {"a": {"method": {"cap": False}}}}, ("variants.a", "did you mean 'capu'")),
    ],
    ids=[
        "unknown key",
        "wrong type",
        "L0 not below F",
        "missing key",
        "model name",
        "method",
        "variant called like a baseline",
        "unknown key of a variant",
    ],
)
def test_bad_configuration_is_one_line_and_exit_status_2(
    sweep: Sweep, changes: dict[str, dict[str, object]], words: tuple[str, ...]
) -> None:
    sweep.configure(**changes)
    result = sweep.run("--quiet", "all")
    assert result.returncode == 2
    assert "Traceback" not in result.stdout
    lines = [line for line in result.stdout.splitlines() if "config.yaml" in line]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not (sweep.directory / "results").exists()


def test_dag_of_a_hundred_cells_takes_little_work_and_imports_no_torch(sweep: Sweep) -> None:
    """Work is counted in calls of functions, which another machine does not change."""
    models = {f"m{i}": SMALL["models"]["tiny"] for i in range(10)}
    sweep.configure(models=models, grid={"L0_target": list(range(2, 12))})
    probe = (
        "import cProfile, pstats, sys, snakemake.cli\n"
        "profile = cProfile.Profile()\n"
        "try:\n"
        "    profile.runcall(snakemake.cli.main, sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "calls = pstats.Stats(profile).total_calls\n"
        "heavy = {'torch', 'transformers', 'transformer_lens'} & set(sys.modules)\n"
        "sys.stderr.write(f'\\nheavy={sorted(heavy)} calls={calls}\\n')\n"
    )
    arguments = ["-s", str(ROOT / "Snakefile"), "-n", "-q", "all", "--configfile", "config.yaml"]
    result = subprocess.run(
        [sys.executable, "-c", probe, *arguments],
        cwd=sweep.directory,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    heavy, calls = result.stderr.strip().splitlines()[-1].split()
    assert heavy == "heavy=[]"
    assert 10**6 < int(calls.removeprefix("calls=")) < 10**7


def test_lint_is_clean(sweep: Sweep) -> None:
    result = sweep.run("--lint")
    assert result.returncode == 0, result.stdout


def test_snakefmt_is_clean() -> None:
    command = [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "workflow"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_default_profile_is_found_beside_the_snakefile() -> None:
    assert (ROOT / "profiles" / "default" / "config.yaml").exists()
    assert Path(ROOT / "profiles").is_symlink()
