"""Mends what `snakemake-executor-plugin-slurm` 2.8.0 gets wrong, where it is in use.

A few of its methods and functions are wrapped, here and inside its jobs; submission and everything
else stay the plugin's. Each wrapper can go when the plugin does itself what it is there for:

- The plugin asks for the states of all jobs at once. When five questions in a row get no answer, as
  while the controller restarts, it hands none of the jobs back to be asked about again, and
  Snakemake waits forever for jobs that nobody looks after.
- ``sacct`` says ``CANCELLED by 1000``, which the plugin does not know for an end. A job that was
  preempted at a site that cancels such jobs stays ``PREEMPTED``, which it takes for a pause.
- Asked for job arrays, it puts jobs aside until the rest of their rule may start, and forgets them.
- The path of the Python interpreter goes into the job's script as it is, and a space in it makes
  two words.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import AsyncIterator
from typing import Any

PLUGIN = "snakemake_executor_plugin_slurm"
JOBSTEP = "snakemake_executor_plugin_slurm_jobstep"


def mend() -> None:
    """Wrap what needs it; does nothing where the plugin is not loaded, or a second time."""
    for name in (PLUGIN, JOBSTEP):
        plugin = sys.modules.get(name)
        if plugin is not None:
            _replace(plugin.Executor, "get_python_executable", _quoting)
    plugin = sys.modules.get(PLUGIN)
    if plugin is not None:
        _replace(plugin.Executor, "check_active_jobs", _keeping)
        _replace(plugin, "query_job_status", _plain)
        _replace(plugin, "pending_jobs_for_rule", _none)


def _replace(owner: Any, name: str, wrap: Any) -> None:
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "__wrapped__"):
        return
    wrapper = wrap(original)
    wrapper.__wrapped__ = original
    setattr(owner, name, wrapper)


def _quoting(original: Any) -> Any:
    def get_python_executable(executor: Any) -> Any:
        path = original(executor)
        return shlex.quote(path) if path == sys.executable else path

    return get_python_executable


def _none(original: Any) -> Any:
    def pending_jobs_for_rule(dag: Any, rule_name: str) -> int:
        return 0  # jobs to wait for: Snakemake counts those that it handed over as running

    return pending_jobs_for_rule


def _keeping(original: Any) -> Any:
    async def check_active_jobs(executor: Any, active_jobs: list[Any]) -> AsyncIterator[Any]:
        answers = getattr(executor, "_status_query_calls", None)
        async for job in original(executor, active_jobs):
            yield job
        if answers is not None and executor._status_query_calls == answers:
            for job in active_jobs:
                yield job

    return check_active_jobs


def _plain(original: Any) -> Any:
    async def query_job_status(command: str, logger: Any) -> Any:
        states, seconds = await original(command, logger)
        states = states and {job: words.partition(" ")[0] for job, words in states.items()}
        if states and command.startswith("squeue"):  # which shows a job that is requeued as pending
            states = {job: s.replace("PREEMPTED", "CANCELLED") for job, s in states.items()}
        return states, seconds

    return query_job_status
