# Pages to look at features, one per SAE. Nothing else needs them: `snakemake dashboards`.

SHOWN = [
    wildcards_of(cell) for cell in SWEEP.cells() if cell.method in ("spalf", *BASELINES)
]


rule dashboard:
    input:
        calibrated,
        rules.phase1.output.state,
        rules.phase1.output.metrics,
        rules.phase2.output.state,
        rules.phase2.output.metrics,
        calibration=calibration_of,
        phase1=rules.phase1.output.metadata,
        phase2=rules.phase2.output.metadata,
        evaluation=rules.evaluate.output,
        frontier=rules.aggregate.output.frontier,
    output:
        report(
            f"{CELL}/dashboard.html",
            caption="../report/dashboard.rst",
            category="Features",
            labels={
                "model": "{model}",
                "method": "spalf",
                "L0": "{L0}",
                "seed": "{seed}",
            },
        ),
    log:
        f"{CELL}/logs/dashboard.log",
    benchmark:
        f"{CELL}/benchmarks/dashboard.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("dashboard"),
        runtime=minutes("dashboard"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["dashboard"],
        settings=settings("dashboard"),
        calibration=subpath(input.calibration, parent=True),
        phase1=subpath(input.phase1, parent=True),
        phase2=subpath(input.phase2, parent=True),
        names=names,
    message:
        "Page of features of {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf dashboard --settings {params.settings:q}"
        " --if-locked wait --runtime {resources.execution:q}"
        " {params.names:q} --calibration {params.calibration:q}"
        " --phase1 {params.phase1:q} --phase2 {params.phase2:q}"
        " --evaluation {input.evaluation:q} --frontier {input.frontier:q}"
        " --out {output:q} > {log:q} 2>&1"


rule dashboard_baseline:
    input:
        calibrated,
        rules.baseline.output.sae,
        calibration=calibration_of,
        sae=rules.baseline.output.metadata,
        evaluation=rules.evaluate_baseline.output,
        frontier=rules.aggregate.output.frontier,
    output:
        report(
            f"{BASELINE}/dashboard.html",
            caption="../report/dashboard.rst",
            category="Features",
            labels={
                "model": "{model}",
                "method": "{method}",
                "L0": "{L0}",
                "seed": "{seed}",
            },
        ),
    log:
        f"{BASELINE}/logs/dashboard.log",
    benchmark:
        f"{BASELINE}/benchmarks/dashboard.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("dashboard_baseline"),
        runtime=minutes("dashboard_baseline"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["dashboard_baseline"],
        settings=settings("dashboard_baseline"),
        calibration=subpath(input.calibration, parent=True),
        sae=subpath(input.sae, parent=True),
    message:
        "Page of features of {wildcards.method} of {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf dashboard --settings {params.settings:q}"
        " --if-locked wait --runtime {resources.execution:q}"
        " --model {wildcards.model:q} --calibration {params.calibration:q} --sae {params.sae:q}"
        " --evaluation {input.evaluation:q} --frontier {input.frontier:q}"
        " --out {output:q} > {log:q} 2>&1"


rule dashboard_imported:
    input:
        calibrated,
        expand(f"{IMPORT}/{{file}}", file=SAELENS, allow_missing=True),
        calibration=calibration_of,
        sae=f"{IMPORT}/metadata.json",
        evaluation=rules.evaluate_imported.output,
        frontier=rules.aggregate.output.frontier,
    output:
        report(
            f"{IMPORT}/dashboard.html",
            caption="../report/dashboard.rst",
            category="Features",
            labels={"model": "{model}", "method": "{name}", "L0": "–", "seed": "–"},
        ),
    log:
        f"{IMPORT}/logs/dashboard.log",
    benchmark:
        f"{IMPORT}/benchmarks/dashboard.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("dashboard_baseline"),
        runtime=minutes("dashboard_baseline"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["dashboard_baseline"],
        settings=settings("dashboard_baseline"),
        calibration=subpath(input.calibration, parent=True),
        sae=subpath(input.sae, parent=True),
    message:
        "Page of features of {wildcards.name}, imported for {wildcards.model}"
    shell:
        "exec {resources.launch} spalf dashboard --settings {params.settings:q}"
        " --if-locked wait --runtime {resources.execution:q}"
        " --model {wildcards.model:q} --calibration {params.calibration:q} --sae {params.sae:q}"
        " --evaluation {input.evaluation:q} --frontier {input.frontier:q}"
        " --out {output:q} > {log:q} 2>&1"


rule dashboards:
    input:
        of_cells(f"{CELL}/dashboard.html", SHOWN),
        of_cells(f"{IMPORT}/dashboard.html", IMPORTED),
