import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from snakemake.utils import update_config

from spalf.config import parse_sweep
from spalf.errors import UserError
from workflow import lock, outage, resources as needs, steps


def read_sweep():
    """The configuration as typed data; a fault in it is one line and exit status 2."""
    update_config(config, steps.typed(workflow.config_settings.config))
    names = [os.path.relpath(name) for name in workflow.configfiles]
    try:
        return parse_sweep(config, ", ".join(names) or "config")
    except UserError as error:
        sys.stderr.write(f"{error}\n")  # also where --quiet silences the log
        sys.exit(2)


needs.find_commands()
if workflow.is_main_process and not workflow.dryrun:
    lock.explain(Path(".snakemake"))
    outage.keep_jobs_without_answer()
SWEEP = read_sweep()
LAUNCH = Path(workflow.basedir, "workflow", "scripts", "launch.py")
CALIBRATION = "results/{model}/calibration"
CELL = "results/{model}/L0_{L0}/seed_{seed}"
PARAMETERS = ("model", "tensors")
STATE = ("model", "tensors", "control", "optimizer")
TOKENS = ("train.npy", "calibration.npy", "evaluation.npy", "tokens.json")


def wildcards_of(cell):
    """A cell's place in the tree of results."""
    return {"model": cell.model, "L0": f"{cell.L0_target:g}", "seed": str(cell.seed)}


CONFIGS = {tuple(wildcards_of(c).values()): SWEEP.run_config(c) for c in SWEEP.cells()}
CELLS = [dict(zip(("model", "L0", "seed"), key)) for key in CONFIGS]


wildcard_constraints:
    model="|".join(map(re.escape, SWEEP.models)),
    L0="|".join(sorted({re.escape(cell["L0"]) for cell in CELLS})),
    seed=r"\d+",


def run_config(wildcards):
    """The configuration of a cell, or of the model's first cell for the step they share."""
    key = tuple(wildcards)
    if len(key) == 1:
        return next(run for (model, *_), run in CONFIGS.items() if model == key[0])
    if key not in CONFIGS:
        raise WorkflowError(
            f"L0_{key[1]}/seed_{key[2]} of {key[0]} is not in the grid; add it"
        )
    return CONFIGS[key]


def settings(step):
    return lambda wildcards: steps.settings(step, run_config(wildcards))


def site(wildcards):
    """What calibration measured, once it has run."""
    path = CALIBRATION.format(model=wildcards.model)
    return needs.measured_site(Path(path) / "metadata.json")


def memory(step):
    return lambda wildcards, attempt: needs.memory_mb(
        step, run_config(wildcards), attempt, site(wildcards)
    )


def minutes(step):
    return lambda wildcards, attempt: needs.minutes(
        step, run_config(wildcards), attempt, site(wildcards), walltime_limit()
    )


def walltime_limit():
    """``max_runtime`` of the profile's ``default-resources``, in minutes."""
    given = workflow.resource_settings._parsed_default_resources.get("max_runtime")
    return given.value


def step_threads(wildcards):
    return needs.threads(run_config(wildcards))


def gpus(wildcards):
    return needs.gpus(run_config(wildcards))


def execution(wildcards):
    return needs.execution(run_config(wildcards))


def launch(wildcards):
    """What starts the step's command; on a machine with several GPUs it picks one."""
    locks = ["--gpu-locks", ".snakemake/gpus"] if gpus(wildcards) else []
    return shlex.join([sys.executable, str(LAUNCH), *locks])


def of_cells(path):
    """``path`` for every cell of the grid, in the order of the configuration."""
    return [path.format(**cell) for cell in CELLS]


def control_arguments():
    """``--control MODEL=FILE`` for the metrics of every cell and phase."""
    return [
        argument
        for cell in CELLS
        for phase in ("phase1", "phase2")
        for argument in (
            "--control",
            f"{cell['model']}={CELL.format(**cell)}/{phase}/metrics.jsonl",
        )
    ]


def prune_checkpoints():
    """Remove the checkpoints and locks of finished steps; they are only needed to resume."""
    models = [Path(CALIBRATION.format(model=model)) for model in SWEEP.models]
    steps_of_cells = [
        Path(path) / step
        for path in of_cells(CELL)
        for step in ("init", "phase1", "phase2")
    ]
    for path in models + steps_of_cells:
        if (path / "metadata.json").exists():
            shutil.rmtree(
                path.with_name(f"{path.name}.checkpoints"), ignore_errors=True
            )
    for path in map(Path, of_cells(f"{CELL}/evaluation.json")):
        if path.exists():
            shutil.rmtree(path.with_suffix(".checkpoints"), ignore_errors=True)


def note_holder():
    """Write down who holds the lock, for the message of whoever finds it."""
    lock.note_holder(Path(".snakemake"))


def name_stopped_steps():
    """For each cell that failed: which job, node, reason and log."""
    from spalf.report.status import describe_stopped

    sys.stderr.write(f"\n{describe_stopped(Path('results'))}\n")
