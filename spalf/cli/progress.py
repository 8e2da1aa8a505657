"""Progress on a terminal (tqdm's bar) or in a log file (a line every few seconds)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from spalf.steps.context import Progress

logger = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 5.0


def open_progress(description: str, total: int, initial: int) -> Progress:
    """A bar where standard error is a terminal, plain lines elsewhere."""
    kind = _Bar if sys.stderr.isatty() else _Lines
    return kind(description, total, initial)


def _shown(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.3g}" for name, value in values.items())


class _Bar:
    def __init__(self, description: str, total: int, initial: int) -> None:
        self._bar = tqdm(desc=description, total=total, initial=initial, dynamic_ncols=True)
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()

    def update(self, amount: int, shown: Mapping[str, float] | None = None) -> None:
        if shown:
            self._bar.set_postfix_str(_shown(shown), refresh=False)
        self._bar.update(amount)

    def close(self) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)


class _Lines:
    def __init__(self, description: str, total: int, initial: int) -> None:
        self._description, self._total, self._initial = description, total, initial
        self._done, self._values = initial, ""
        self._started = self._printed = time.monotonic()

    def update(self, amount: int, shown: Mapping[str, float] | None = None) -> None:
        self._done += amount
        self._values = _shown(shown) if shown else self._values
        if time.monotonic() - self._printed >= LINE_EVERY_SECONDS:
            self._line()

    def close(self) -> None:
        self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        elapsed = max(1e-9, self._printed - self._started)
        line = tqdm.format_meter(
            self._done,
            self._total,
            elapsed,
            initial=self._initial,
            bar_format="{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
        )
        logger.info("%s: %s %s", self._description, line, self._values)
