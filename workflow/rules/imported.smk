rule evaluate_imported:
    input:
        calibrated,
        expand(f"{IMPORT}/{{file}}", file=SAELENS, allow_missing=True),
        calibration=calibration_of,
        sae=f"{IMPORT}/metadata.json",
    output:
        f"{IMPORT}/evaluation.json",
    log:
        f"{IMPORT}/logs/evaluate.log",
    benchmark:
        f"{IMPORT}/benchmarks/evaluate.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("evaluate"),
        runtime=minutes("evaluate"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["evaluate"],
        settings=settings("evaluate_baseline"),
        calibration=subpath(input.calibration, parent=True),
        sae=subpath(input.sae, parent=True),
    message:
        "Evaluating {wildcards.name}, imported for {wildcards.model}"
    shell:
        "exec {resources.launch} spalf evaluate --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " --model {wildcards.model:q} --calibration {params.calibration:q}"
        " --sae {params.sae:q} --out {output:q} > {log:q} 2>&1"
