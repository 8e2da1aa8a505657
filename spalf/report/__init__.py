"""From evaluation files to tables and figures. Reads and writes files; needs no torch."""

from spalf.report.aggregate import aggregate
from spalf.report.figures import control_figure, pareto_figures
from spalf.report.places import evaluations_of, metrics_of
from spalf.report.tables import write_tables

__all__ = [
    "aggregate",
    "control_figure",
    "evaluations_of",
    "metrics_of",
    "pareto_figures",
    "write_tables",
]
