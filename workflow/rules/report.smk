# The commands are told the grid, not its files: a thousand cells have more of them than a command
# line may hold.


rule aggregate:
    input:
        of_cells(f"{CELL}/evaluation.json", EVALUATED)
        + of_cells(f"{IMPORT}/evaluation.json", IMPORTED),
    output:
        frontier="results/tables/frontier.csv",
        phases="results/tables/phases.csv",
        provenance="results/tables/provenance/aggregate.json",
    log:
        "results/tables/logs/aggregate.log",
    benchmark:
        "results/tables/benchmarks/aggregate.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        origin=origin("aggregate"),
    params:
        revision=steps.REVISIONS["aggregate"],
        settings=grid,
        out=subpath(output.frontier, parent=True),
    message:
        "Collecting every cell's evaluation"
    shell:
        "spalf aggregate --settings {params.settings:q} --out {params.out:q}"
        " --workflow {resources.origin:q} > {log:q} 2>&1"


rule tables:
    input:
        csv=[rules.aggregate.output.frontier, rules.aggregate.output.phases],
    output:
        report(
            "results/tables/frontier.html",
            caption="../report/tables.rst",
            category="Tables",
            labels={"table": "one row per SAE"},
        ),
        report(
            "results/tables/phases.html",
            caption="../report/tables.rst",
            category="Tables",
            labels={"table": "one row per SAE and phase"},
        ),
        expand("results/tables/{name}.md", name=("frontier", "phases")),
        "results/tables/phases.tex",
        "results/tables/provenance/tables.json",
        frontier="results/tables/frontier.tex",
    log:
        "results/tables/logs/tables.log",
    benchmark:
        "results/tables/benchmarks/tables.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        origin=origin("tables"),
    params:
        revision=steps.REVISIONS["tables"],
        out=subpath(output.frontier, parent=True),
    message:
        "Writing the tables as Markdown, LaTeX and HTML"
    shell:
        "spalf tables --out {params.out:q} --workflow {resources.origin:q} {input.csv:q} > {log:q} 2>&1"


rule figures:
    input:
        metrics=of_cells(f"{CELL}/phase1/metrics.jsonl", PLAIN)
        + of_cells(f"{CELL}/phase2/metrics.jsonl", PLAIN),
        frontier=rules.aggregate.output.frontier,
    output:
        report(
            "results/figures/pareto.png",
            caption="../report/pareto.rst",
            category="Frontier",
            labels={"figure": "ΔCE and explained variance against L0"},
        ),
        [
            report(
                f"results/figures/control_{model}.png",
                caption="../report/control.rst",
                category="Course of training",
                labels={"model": model},
            )
            for model in dict.fromkeys(cell["model"] for cell in PLAIN)
        ],
        expand(
            "results/figures/control_{model}.pdf",
            model=dict.fromkeys(cell["model"] for cell in PLAIN),
        ),
        "results/figures/provenance/figures.json",
        pdf="results/figures/pareto.pdf",
    log:
        "results/figures/logs/figures.log",
    benchmark:
        "results/figures/benchmarks/figures.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=10,
        origin=origin("figures"),
    params:
        revision=steps.REVISIONS["figures"],
        settings=grid,
        out=subpath(output.pdf, parent=True),
    message:
        "Drawing the frontier and the course of training"
    shell:
        "spalf figures --settings {params.settings:q} --frontier {input.frontier:q}"
        " --workflow {resources.origin:q} --out {params.out:q} > {log:q} 2>&1"
