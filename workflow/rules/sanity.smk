# SAEs that nobody trained, and the dictionaries of several seeds beside each other.


rule random:
    input:
        calibrated,
        calibration=calibration_of,
    output:
        sae=expand(f"{BASELINE}/baseline/{{file}}", file=SAELENS, allow_missing=True),
        metadata=f"{BASELINE}/baseline/metadata.json",
    log:
        f"{BASELINE}/logs/random.log",
    benchmark:
        f"{BASELINE}/benchmarks/random.tsv"
    wildcard_constraints:
        method=RANDOM,
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("random"),
        runtime=minutes("random"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["random"],
        settings=settings("random"),
        calibration=subpath(input.calibration, parent=True),
        out=subpath(output.metadata, parent=True),
    message:
        "An untrained SAE for {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf random --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " --calibration {params.calibration:q} --out {params.out:q} > {log:q} 2>&1"


rule consistency:
    input:
        of_seeds("model.safetensors", "sae_weights.safetensors"),
        of_seeds("tensors.safetensors", "cfg.json"),
        metadata=of_seeds("metadata.json", "metadata.json"),
    output:
        CONSISTENCY,
    log:
        "results/{series}/L0_{L0}/logs/consistency.log",
    benchmark:
        "results/{series}/L0_{L0}/benchmarks/consistency.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("consistency"),
        runtime=minutes("consistency"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["consistency"],
        saes=lambda wildcards, input: [
            str(Path(path).parent) for path in input.metadata
        ],
    message:
        "Comparing the seeds of {wildcards.series}, L0 {wildcards.L0}"
    shell:
        "exec {resources.launch} spalf consistency --runtime {resources.execution:q}"
        " --out {output:q} {params.saes:q} > {log:q} 2>&1"
