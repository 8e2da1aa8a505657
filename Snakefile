from snakemake.utils import min_version

min_version("9.20")

# A file given by --configfile replaces the default one, it is not merged into it: another grid
# must not inherit the default grid's models.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/sanity.smk"
include: "workflow/rules/imported.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/dashboard.smk"
include: "workflow/rules/paper.smk"


localrules:
    all,
    aggregate,
    tables,
    figures,
    dashboards,
    paper,
    paper_partial,


rule all:
    default_target: True
    input:
        # Named although the tables need them, so that one that was deleted is made again.
        rules.aggregate.input,
        rules.tables.output,
        rules.figures.output,


onstart:
    note_holder()


onsuccess:
    prune_checkpoints()


onerror:
    name_stopped_steps()
    paper_of_what_is_there()
