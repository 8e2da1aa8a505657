# The shell of each step becomes the step's process (exec), so that the signal with which a cluster
# announces a time limit reaches it, and nobody who waits for the shell leaves before the checkpoint
# is written. A step that finds a job of an earlier run still at work waits for it and takes its result.


rule calibrate:
    output:
        tokens=expand(f"{CALIBRATION}/tokens/{{file}}", file=TOKENS, allow_missing=True),
        tensors=f"{CALIBRATION}/calibration.safetensors",
        metadata=f"{CALIBRATION}/metadata.json",
    log:
        f"{CALIBRATION}/logs/calibrate.log",
    benchmark:
        f"{CALIBRATION}/benchmarks/calibrate.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("calibrate"),
        runtime=minutes("calibrate"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["calibrate"],
        settings=settings("calibrate"),
        out=subpath(output.metadata, parent=True),
    message:
        "Calibrating {wildcards.model}: token splits, mean and covariance, whitener, anchors"
    shell:
        "exec {resources.launch} spalf calibrate --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " --out {params.out:q} > {log:q} 2>&1"


rule init:
    input:
        calibrated,
        calibration=calibration_of,
    output:
        parameters=expand(
            f"{CELL}/init/{{name}}.safetensors", name=PARAMETERS, allow_missing=True
        ),
        metadata=f"{CELL}/init/metadata.json",
    log:
        f"{CELL}/logs/init.log",
    benchmark:
        f"{CELL}/benchmarks/init.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("init"),
        runtime=minutes("init"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["init"],
        settings=settings("init"),
        calibration=subpath(input.calibration, parent=True),
        out=subpath(output.metadata, parent=True),
    message:
        "Initialising {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf init --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " --calibration {params.calibration:q} --out {params.out:q} > {log:q} 2>&1"


# Where cells are packed one job takes all cells of a model, or of a variant, through both phases.
# The jobs of the phases then find their results, and train nothing.
rule pack:
    input:
        calibrated,
        initialised,
        calibration=calibration_of,
    output:
        PACK,
    log:
        "results/{model}/logs/pack.log",
    benchmark:
        "results/{model}/benchmarks/pack.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("pack"),
        runtime=minutes("pack"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=[steps.REVISIONS[step] for step in ("pack", "phase1", "phase2")],
        settings=settings("pack"),
        calibration=subpath(input.calibration, parent=True),
        cells=pack_arguments,
    message:
        "Both phases of every cell of {wildcards.model}"
    shell:
        "exec {resources.launch} spalf pack --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " {params.cells:q} --calibration {params.calibration:q} --out {output:q} > {log:q} 2>&1"


rule phase1:
    input:
        calibrated,
        rules.init.output.parameters,
        packed,
        calibration=calibration_of,
        init=rules.init.output.metadata,
    output:
        state=expand(
            f"{CELL}/phase1/{{name}}.safetensors", name=STATE, allow_missing=True
        ),
        metadata=f"{CELL}/phase1/metadata.json",
        metrics=f"{CELL}/phase1/metrics.jsonl",
    log:
        f"{CELL}/logs/phase1.log",
    benchmark:
        f"{CELL}/benchmarks/phase1.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("phase1"),
        runtime=minutes("phase1"),
        gpu=gpus_of("phase1"),
        execution=execution,
        launch=launch,
        taking=taking("phase1"),
    params:
        revision=steps.REVISIONS["phase1"],
        settings=settings("phase1"),
        calibration=subpath(input.calibration, parent=True),
        init=subpath(input.init, parent=True),
        out=subpath(output.metadata, parent=True),
    message:
        "Phase 1 of {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf phase1 --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " {resources.taking}"
        " --calibration {params.calibration:q} --init {params.init:q}"
        " --out {params.out:q} > {log:q} 2>&1"


rule phase2:
    input:
        calibrated,
        rules.phase1.output.state,
        rules.phase1.output.metrics,
        calibration=calibration_of,
        phase1=rules.phase1.output.metadata,
    output:
        state=expand(
            f"{CELL}/phase2/{{name}}.safetensors", name=STATE, allow_missing=True
        ),
        metadata=f"{CELL}/phase2/metadata.json",
        metrics=f"{CELL}/phase2/metrics.jsonl",
    log:
        f"{CELL}/logs/phase2.log",
    benchmark:
        f"{CELL}/benchmarks/phase2.tsv"
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("phase2"),
        runtime=minutes("phase2"),
        gpu=gpus_of("phase2"),
        execution=execution,
        launch=launch,
        taking=taking("phase2"),
    params:
        revision=steps.REVISIONS["phase2"],
        settings=settings("phase2"),
        calibration=subpath(input.calibration, parent=True),
        phase1=subpath(input.phase1, parent=True),
        out=subpath(output.metadata, parent=True),
    message:
        "Phase 2 of {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf phase2 --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " {resources.taking}"
        " --calibration {params.calibration:q} --phase1 {params.phase1:q}"
        " --out {params.out:q} > {log:q} 2>&1"


rule evaluate:
    input:
        calibrated,
        rules.phase1.output.state,
        rules.phase1.output.metrics,
        rules.phase2.output.state,
        rules.phase2.output.metrics,
        calibration=calibration_of,
        phase1=rules.phase1.output.metadata,
        phase2=rules.phase2.output.metadata,
    output:
        f"{CELL}/evaluation.json",
    log:
        f"{CELL}/logs/evaluate.log",
    benchmark:
        f"{CELL}/benchmarks/evaluate.tsv"
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
        settings=settings("evaluate"),
        calibration=subpath(input.calibration, parent=True),
        phase1=subpath(input.phase1, parent=True),
        phase2=subpath(input.phase2, parent=True),
        names=names,
    message:
        "Evaluating {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf evaluate --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " {params.names:q} --calibration {params.calibration:q}"
        " --phase1 {params.phase1:q} --phase2 {params.phase2:q} --out {output:q} > {log:q} 2>&1"


rule baseline:
    input:
        calibrated,
        calibration=calibration_of,
        first=first_seed_of,
    output:
        sae=expand(f"{BASELINE}/baseline/{{file}}", file=SAELENS, allow_missing=True),
        metadata=f"{BASELINE}/baseline/metadata.json",
    log:
        f"{BASELINE}/logs/baseline.log",
    benchmark:
        f"{BASELINE}/benchmarks/baseline.tsv"
    wildcard_constraints:
        method="|".join(BASELINES),
    conda:
        "../../environment.yml"
    threads: step_threads
    resources:
        mem_mb=memory("baseline"),
        runtime=minutes("baseline"),
        gpu=gpus,
        execution=execution,
        launch=launch,
    params:
        revision=steps.REVISIONS["baseline"],
        settings=settings("baseline"),
        calibration=subpath(input.calibration, parent=True),
        rate_of=rate_of,
        out=subpath(output.metadata, parent=True),
    message:
        "{wildcards.method} of {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf baseline --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " --method {wildcards.method:q} --calibration {params.calibration:q}"
        " {params.rate_of:q} --out {params.out:q} > {log:q} 2>&1"


rule evaluate_baseline:
    input:
        calibrated,
        rules.baseline.output.sae,
        calibration=calibration_of,
        sae=rules.baseline.output.metadata,
    output:
        f"{BASELINE}/evaluation.json",
    log:
        f"{BASELINE}/logs/evaluate.log",
    benchmark:
        f"{BASELINE}/benchmarks/evaluate.tsv"
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
        "Evaluating {wildcards.method} of {wildcards.model}, L0 {wildcards.L0}, seed {wildcards.seed}"
    shell:
        "exec {resources.launch} spalf evaluate --settings {params.settings:q}"
        " --if-locked wait --if-foreign restart --runtime {resources.execution:q}"
        " --model {wildcards.model:q} --calibration {params.calibration:q}"
        " --sae {params.sae:q} --out {output:q} > {log:q} 2>&1"
