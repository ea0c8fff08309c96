"""Progress of a long run: a bar with an estimate on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bitmill.cli.say import duration, note

EVERY = 2.0  # least seconds between plain lines of one event
SHARE = 0.05  # and the share of the time so far: a long run says less often
TITLES = {
    "calibrate": "calibration text",
    "tokens": "calibration text",
    "block": "quantizing",
    "original": "running the original",
    "tune": "tuning",
    "rotate": "learning rotations",
    "freeze": "freezing the base",
    "finetune": "learning",
    "train-ternary": "learning",
    "activations": "summing activations",
    "gradients": "summing gradients",
    "damage": "damage by type",
    "output": "outputs",
    "convert": "converting",
    "verify": "reading back",
    "resume": "resuming",
    "seal": "writing",
    "sample": "sampling",
    "read": "reading",
    "measure": "measuring",
    "floor": "noise floor",
    "tensors": "comparing tensors",
    "panels": "looking into tensors",
    "tier": "tiers",
    "bench": "timing",
    "timing": "timing blocks",
    "sums": "checksums",
    "values": "looking at values",
}


def quiet() -> None:
    """No bars and advice of other libraries between our lines: what matters comes as notes and refusals."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


class Teller:
    """Called as ``teller(event, done, total, text)`` by the library; a context manager.

    Args:
        live: a bar (True) or plain lines (False); None asks the terminal.
    """

    def __init__(self, live: bool | None = None) -> None:
        self._live = sys.stderr.isatty() if live is None else live
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Teller:
        quiet()
        if self._live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}", style="dim"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=False)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: str, done: int, total: int, text: str) -> None:
        """One step of ``event``: ``done`` of ``total``."""
        if self._bar is not None:
            self._move(self._bar, event, done, total, text)
        else:
            self._line(event, done, total, text)

    def _move(self, bar: Progress, event: str, done: int, total: int, text: str) -> None:
        if event not in self._tasks:
            self._tasks[event] = bar.add_task(TITLES.get(event, event), total=total, said="")
        bar.update(self._tasks[event], completed=done, total=total, said=text)

    def _line(self, event: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        started, first = self._started.setdefault(event, (now, done))
        finished = done >= total
        pause = max(EVERY, SHARE * (now - started))
        if not finished and now - self._said.get(event, -pause) < pause:
            return
        self._said[event] = now
        moved = done - first
        left = (
            "" if finished or moved <= 0 else f", {duration((now - started) / moved * (total - done))} left"
        )
        title = TITLES.get(event, event)
        note(f"{title} {done}/{total}{left}  {text}".rstrip())
