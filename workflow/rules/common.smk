import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from snakemake.utils import update_config

from spalf.config import BASELINES, RANDOM, parse_sweep
from spalf.config.io import read_mapping
from spalf.errors import UserError
from workflow import executor, lock, resources as needs, steps


def read_sweep():
    """The configuration as typed data; a fault in it is one line and exit status 2.

    Where another workflow imports this one as a module, the configuration is what that gives, and
    ``--config`` is that workflow's.
    """
    if workflow.modifier.is_main_snakefile():
        update_config(config, steps.typed(workflow.config_settings.config))
    names = [os.path.relpath(name) for name in workflow.configfiles]
    try:
        for name in names:
            read_mapping(name)  # Snakemake takes the last of two equal keys
        return parse_sweep(config, ", ".join(names) or "config")
    except UserError as error:
        sys.stderr.write(f"{error}\n")  # also where --quiet silences the log
        sys.exit(2)


needs.find_commands()
executor.mend()
if workflow.is_main_process and not workflow.dryrun:
    lock.explain(Path(".snakemake"))
SWEEP = read_sweep()
LAUNCH = Path(steps.__file__).with_name("scripts") / "launch.py"
MANUSCRIPT = os.path.relpath(Path(steps.__file__).parents[1] / "paper/manuscript.typ")
CALIBRATION = "results/{model}/calibration"
CELL = "results/{model}/L0_{L0}/seed_{seed}"
PACK = "results/{model}/pack.json"
BASELINE = "results/{model}/{method}/L0_{L0}/seed_{seed}"
CONSISTENCY = "results/{series}/L0_{L0}/consistency.json"
IMPORT = "results/{model}/imported/{name}"
PARAMETERS = ("model", "tensors")
STATE = ("model", "tensors", "control", "optimizer")
TOKENS = ("train.npy", "calibration.npy", "evaluation.npy", "tokens.json")
SAELENS = ("cfg.json", "sae_weights.safetensors")


def wildcards_of(cell):
    """A cell's place in the tree of results; a variant has its name after the model's."""
    return {"model": cell.series, "L0": f"{cell.L0_target:g}", "seed": str(cell.seed)}


CONFIGS = {tuple(wildcards_of(c).values()): SWEEP.run_config(c) for c in SWEEP.cells()}
EVALUATED = [wildcards_of(cell) for cell in SWEEP.cells()]
CELLS = [wildcards_of(cell) for cell in SWEEP.cells() if cell.method == "spalf"]
PLAIN = [cell for cell in CELLS if cell["model"] in SWEEP.models]
# SAEs that `spalf import` put beside those of the sweep.
IMPORTED = [
    {"model": model, "name": found.parent.name}
    for model in SWEEP.models
    for found in sorted(Path("results", model, "imported").glob("*/metadata.json"))
]


def first_config(series):
    """The configuration of the first cell of a model, of a variant, or of a model's baseline."""
    found = [run for (model, *_), run in CONFIGS.items() if model == series]
    return (
        found
        or [
            run
            for (model, *_), run in CONFIGS.items()
            if model.startswith(f"{series}/")
        ]
    )[0]


def calibrated_as(series):
    """Whose calibration a series uses: the model's, unless a variant changes what it depends on."""
    model, _, name = series.partition("/")
    settings_of = [
        steps.settings("calibrate", first_config(x)) for x in (model, series)
    ]
    return model if settings_of[0] == settings_of[1] else series


CALIBRATED_AS = {
    series: calibrated_as(series)
    for series in [*SWEEP.models, *(cell["model"] for cell in EVALUATED)]
}


wildcard_constraints:
    model="|".join(
        map(re.escape, dict.fromkeys([*SWEEP.models, *(c["model"] for c in CELLS)]))
    ),
    method="|".join([*BASELINES, RANDOM]),
    series="|".join(map(re.escape, dict.fromkeys(c["model"] for c in EVALUATED))),
    name="|".join(sorted({re.escape(sae["name"]) for sae in IMPORTED})) or "-",
    L0="|".join(sorted({re.escape(cell["L0"]) for cell in EVALUATED})),
    seed=r"\d+",


def run_config(wildcards):
    """The configuration of a cell, or of the model's first cell for the step they share."""
    if len(wildcards) == 1:
        return first_config(wildcards.model)
    if wildcards.get("name"):
        return imported_config(wildcards)
    if wildcards.get("series"):
        at = (wildcards.series, wildcards.L0)
        return next(run for (*place, _), run in CONFIGS.items() if tuple(place) == at)
    key = (series_of(wildcards), wildcards.L0, wildcards.seed)
    if key not in CONFIGS:
        raise WorkflowError(
            f"L0_{key[1]}/seed_{key[2]} of {key[0]} is not in the grid; add it"
        )
    return CONFIGS[key]


def imported_config(wildcards):
    """The configuration that an imported SAE is evaluated under: the model's, with its own F and L0."""
    known = json.loads(
        Path(
            IMPORT.format(model=wildcards.model, name=wildcards.name), "metadata.json"
        ).read_text()
    )
    changes = {name: known["config"][name] for name in ("F", "L0_target")}
    return first_config(wildcards.model).model_copy(update=changes)


def series_of(wildcards):
    """``model``, ``model/variant`` or ``model/baseline``."""
    if wildcards.get("series"):
        return wildcards.series
    method = wildcards.get("method")
    return f"{wildcards.model}/{method}" if method else wildcards.model


def calibration_of(wildcards):
    """The metadata of the calibration that a cell uses, the one that vouches for the rest."""
    place = CALIBRATION.format(model=CALIBRATED_AS[series_of(wildcards)])
    return f"{place}/metadata.json"


def calibrated(wildcards):
    """Tokens and tensors of that calibration."""
    place = CALIBRATION.format(model=CALIBRATED_AS[series_of(wildcards)])
    tokens = [f"{place}/tokens/{name}" for name in TOKENS]
    return [*tokens, f"{place}/calibration.safetensors"]


def takes_a_rate(wildcards):
    """Whether a baseline takes the learning rate that the first seed chose."""
    tried_by = run_config(wildcards).baselines.tried_by
    return tried_by == "first_seed" and wildcards.seed != str(SWEEP.grid.seed[0])


def first_seed_of(wildcards):
    """The baseline of the first seed, where this one takes its learning rate."""
    first = {**dict(wildcards.items()), "seed": SWEEP.grid.seed[0]}
    metadata = f"{BASELINE}/baseline/metadata.json"
    return metadata.format(**first) if takes_a_rate(wildcards) else []


def rate_of(wildcards, input):
    """``--rate-of`` and that baseline's directory."""
    first = input.get("first")
    return ["--rate-of", str(Path(first).parent)] if first else []


def names(wildcards):
    """``--model`` and, for a variant, ``--variant``."""
    model, _, variant = wildcards.model.partition("/")
    return ["--model", model, *(["--variant", variant] if variant else [])]


def settings(step):
    return lambda wildcards: steps.settings(step, run_config(wildcards))


def grid(wildcards):
    """The whole sweep. A function, because Snakemake looks for wildcards in what is a string."""
    return steps.sweep_settings(SWEEP)


def site(wildcards):
    """What calibration measured, once it has run."""
    path = CALIBRATION.format(model=CALIBRATED_AS[series_of(wildcards)])
    return needs.measured_site(Path(path) / "metadata.json")


def cells_of(wildcards):
    """The cells of a model or a variant, which one job trains where cells are packed."""
    return [cell for cell in CELLS if cell["model"] == wildcards.model]


def cells_at_once(step, wildcards):
    return len(cells_of(wildcards)) if step == "pack" else 1


def at_work(step, wildcards):
    """The configuration by which a step's needs are judged."""
    config = run_config(wildcards)
    alone = step == "baseline" and takes_a_rate(wildcards)
    return needs.at_one_rate(config) if alone else config


def memory(step):
    return lambda wildcards, attempt: needs.memory_mb(
        step,
        at_work(step, wildcards),
        attempt,
        site(wildcards),
        cells_at_once(step, wildcards),
    )


def minutes(step):
    return lambda wildcards, attempt: needs.minutes(
        step,
        at_work(step, wildcards),
        attempt,
        site(wildcards),
        walltime_limit(),
        cells_at_once(step, wildcards),
    )


def packed(wildcards):
    """What a cell waits for where one job trains all cells of its model."""
    return PACK.format(model=wildcards.model) if SWEEP.pack else []


def initialised(wildcards):
    """The initial SAEs of a pack."""
    names = [f"{name}.safetensors" for name in PARAMETERS] + ["metadata.json"]
    return [
        f"{CELL.format(**c)}/init/{name}" for c in cells_of(wildcards) for name in names
    ]


def pack_arguments(wildcards):
    """``--cell L0 SEED DIRECTORY`` for each cell of a pack."""
    return [
        argument
        for cell in cells_of(wildcards)
        for argument in ("--cell", cell["L0"], cell["seed"], CELL.format(**cell))
    ]


def is_taken(phase, wildcards):
    """Whether a pack has done this phase of the cell, so that its job trains nothing."""
    cell, pack = (
        Path(place.format(**dict(wildcards.items()))) for place in (CELL, PACK)
    )
    return SWEEP.pack and needs.took_part(pack, cell, phase)


def gpus_of(phase):
    return lambda wildcards: None if is_taken(phase, wildcards) else gpus(wildcards)


def taking(phase):
    """What is added to the command of a phase that a pack may have done."""
    return lambda wildcards: (
        "--device cpu --finished-only" if is_taken(phase, wildcards) else ""
    )


def walltime_limit():
    """``max_runtime`` of the profile's ``default-resources``, in minutes."""
    given = workflow.resource_settings._parsed_default_resources.get("max_runtime")
    return given.value


def gpu_steps_at_once():
    """``gpu`` of the profile's ``resources``; 1 where nothing limits it."""
    return workflow.global_resources.get("gpu").value or 1


def step_threads(wildcards):
    return needs.threads(run_config(wildcards))


def gpus(wildcards):
    return needs.gpus(run_config(wildcards))


def execution(wildcards):
    return needs.execution(run_config(wildcards))


def launch(wildcards):
    """What starts the step's command; on a machine with several GPUs it picks one."""
    command = [sys.executable, str(LAUNCH)]
    if gpus(wildcards):
        command += ["--gpu-locks", ".snakemake/gpus"]
        command += ["--at-once", str(gpu_steps_at_once())]
    return shlex.join(command)


def of_cells(path, cells=CELLS):
    """``path`` for each cell, in the order of the configuration."""
    return [path.format(**cell) for cell in cells]


def origin(name):
    """What a record of provenance says of this workflow, as JSON; it reruns nothing."""
    return lambda wildcards: steps.origin(
        name,
        [os.path.relpath(path) for path in workflow.configfiles],
        workflow.config_settings.config,
        SWEEP,
    )


def of_seeds(*names):
    """Files of the final SAE of each seed of a series at an L0; ``names`` of SPALF, then of others."""

    def paths(wildcards):
        ours = wildcards.series in {cell["model"] for cell in CELLS}
        folder, name = ("phase2", names[0]) if ours else ("baseline", names[1])
        return [
            f"{CELL.format(**cell)}/{folder}/{name}"
            for cell in EVALUATED
            if (cell["model"], cell["L0"]) == (wildcards.series, wildcards.L0)
        ]

    return paths


def compared():
    """Where the seeds of each series are compared, at each L0; nowhere if there is one seed."""
    places = [
        CONSISTENCY.format(series=cell["model"], L0=cell["L0"]) for cell in EVALUATED
    ]
    return list(dict.fromkeys(places)) if len(SWEEP.grid.seed) > 1 else []


def finished_cells():
    """Evaluations that are there, and when each was written: a new one makes the paper anew."""
    paths = of_cells(f"{CELL}/evaluation.json", EVALUATED)
    paths += of_cells(f"{IMPORT}/evaluation.json", IMPORTED)
    found = [Path(path) for path in paths if Path(path).exists()]
    return [f"{path}@{path.stat().st_mtime_ns}" for path in found]


def prune_checkpoints():
    """Remove the checkpoints and locks of finished steps; they are only needed to resume."""
    models = [Path(CALIBRATION.format(model=series)) for series in CALIBRATED_AS]
    steps_of_cells = [
        Path(path) / step
        for path in of_cells(CELL)
        for step in ("init", "phase1", "phase2")
    ] + [Path(path) / "baseline" for path in of_cells(CELL, EVALUATED)]
    for path in models + steps_of_cells:
        if (path / "metadata.json").exists():
            prune(path.with_name(f"{path.name}.checkpoints"))
    pages = of_cells(f"{CELL}/dashboard.html", EVALUATED)
    pages += of_cells(f"{IMPORT}/dashboard.html", IMPORTED)
    imported = of_cells(f"{IMPORT}/evaluation.json", IMPORTED)
    reports = of_cells(f"{CELL}/evaluation.json", EVALUATED) + imported
    for path in map(Path, reports + pages):
        if path.exists():
            prune(path.with_suffix(".checkpoints"))


def prune(working):
    """Remove a step's working directory.

    Second names of results stay where cells are packed: a new cell makes its pack run again, and
    what depends on the pack finds its result by them.
    """
    for path in working.glob("*"):
        if not (SWEEP.pack and path.name.startswith("finished_")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if working.is_dir() and not any(working.iterdir()):
        working.rmdir()


def note_holder():
    """Write down who holds the lock, for the message of whoever finds it."""
    lock.note_holder(Path(".snakemake"))


def paper_of_what_is_there():
    """Where the manuscript was asked for and steps failed: the one of the results that are there.

    Only with ``--keep-going``, which is how one asks for all that can be had.
    """
    asked = {"paper", "results/paper/paper.pdf"} & set(workflow.dag_settings.targets)
    is_main = workflow.modifier.is_main_snakefile()
    if not (asked and workflow.execution_settings.keep_going and is_main):
        return
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        workflow.main_snakefile,
    ]
    command += ["--nolock", "--quiet", "all", "--cores", "1"]
    overrides = workflow.config_settings.config
    if workflow.overwrite_configfiles:
        command += ["--configfile", *map(str, workflow.overwrite_configfiles)]
    if overrides:
        command += [
            "--config",
            *(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
        ]
    made = (
        subprocess.run([*command, "--", "paper_partial"], check=False).returncode == 0
    )
    sys.stderr.write(
        "\nSteps failed, so there is no results/paper/paper.pdf. "
        + (
            "What is there makes results/paper_partial/paper.pdf, which lists what is missing.\n"
            if made
            else "Nor could one be made of what is there; see results/paper_partial/logs.\n"
        )
    )


def name_stopped_steps():
    """For each cell that failed: which job, node, reason and log."""
    from spalf.report.status import describe_stopped

    sys.stderr.write(f"\n{describe_stopped(Path('results'))}\n")
