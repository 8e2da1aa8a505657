"""Keeps Snakemake waiting for its Slurm jobs while nobody can say how they are.

`snakemake-executor-plugin-slurm` 2.8.0 asks for the states of all jobs at once. When five questions
in a row get no answer, as while the controller restarts, it hands none of the jobs back to be asked
about again: Snakemake then waits forever for jobs that nobody looks after.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

PLUGIN = "snakemake_executor_plugin_slurm"


def keep_jobs_without_answer() -> None:
    """Let the plugin ask again later about jobs whose states it could not learn.

    Does nothing where the plugin is not in use, or is another version that counts its questions
    in another way.
    """
    plugin = sys.modules.get(PLUGIN)
    if plugin is None or hasattr(plugin.Executor.check_active_jobs, "__wrapped__"):
        return
    plugin.Executor.check_active_jobs = _keeping(plugin.Executor.check_active_jobs)


def _keeping(ask: Any) -> Any:
    async def check_active_jobs(executor: Any, active_jobs: list[Any]) -> AsyncIterator[Any]:
        answers = getattr(executor, "_status_query_calls", None)
        async for job in ask(executor, active_jobs):
            yield job
        if answers is not None and executor._status_query_calls == answers:
            for job in active_jobs:
                yield job

    check_active_jobs.__wrapped__ = ask  # type: ignore[attr-defined]
    return check_active_jobs
