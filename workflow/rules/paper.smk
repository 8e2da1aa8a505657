# The manuscript. Nothing else needs it: `snakemake paper`, or `paper_partial` while cells are missing.


rule paper:
    input:
        rules.aggregate.input,
        of_cells(f"{CELL}/phase1/metrics.jsonl", PLAIN),
        of_cells(f"{CELL}/phase2/metrics.jsonl", PLAIN),
        compared(),
        manuscript=MANUSCRIPT,
    output:
        provenance="results/paper/provenance/paper.json",
        numbers="results/paper/numbers.json",
        pdf="results/paper/paper.pdf",
    log:
        "results/paper/logs/paper.log",
    benchmark:
        "results/paper/benchmarks/paper.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=20,
        origin=origin("paper"),
    params:
        revision=steps.REVISIONS["paper"],
        settings=grid,
        out=subpath(output.pdf, parent=True),
    message:
        "Numbers, tables, figures and the manuscript"
    shell:
        "spalf paper --settings {params.settings:q} --manuscript {input.manuscript:q}"
        " --workflow {resources.origin:q} --out {params.out:q} > {log:q} 2>&1"


# Its cells are no inputs, so nothing is trained for it.
rule paper_partial:
    input:
        manuscript=MANUSCRIPT,
    output:
        provenance="results/paper_partial/provenance/paper.json",
        numbers="results/paper_partial/numbers.json",
        pdf="results/paper_partial/paper.pdf",
    log:
        "results/paper_partial/logs/paper.log",
    benchmark:
        "results/paper_partial/benchmarks/paper.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=20,
        origin=origin("paper_partial"),
    params:
        revision=steps.REVISIONS["paper"],
        found=finished_cells(),
        settings=grid,
        out=subpath(output.pdf, parent=True),
    message:
        "The manuscript from the cells that are there"
    shell:
        "spalf paper --partial --settings {params.settings:q} --manuscript {input.manuscript:q}"
        " --workflow {resources.origin:q} --out {params.out:q} > {log:q} 2>&1"
