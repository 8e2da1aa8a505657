"""The manuscript: numbers, tables and figures of a sweep's results, and a PDF made of them."""

from spalf.report.paper.build import build_paper, compile_manuscript

__all__ = ["build_paper", "compile_manuscript"]
