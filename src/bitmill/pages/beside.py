"""What lies beside a file and inside it that its page shows: the run's report, its tensors, its memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitmill.core.axes import Checkpoint
from bitmill.journal import report_path
from bitmill.measurement.report import worst_tensors
from bitmill.pages.anatomy import MOST_TENSORS, anatomies
from bitmill.pages.heat import cells_of
from bitmill.pages.memory import stack
from bitmill.pages.record import Extras
from bitmill.source import open_path

_LARGEST = 64 << 20


def beside(
    record: Mapping[str, Any],
    path: Path,
    reference: Checkpoint,
    commands: Sequence[str] = (),
    tell: Callable[[int, int], None] = lambda *_: None,
) -> Extras:
    """Everything a page shows of one file but its measurement.

    Args:
        record: of that measurement.
        commands: that make and measure it again.
        tell: called with tensors done and in all, while they are looked into.
    """
    report = report_of(path)
    seconds = report.get("seconds")
    times = [("measuring", "bar pooled", 0.0, float(record["seconds"]))]
    if isinstance(seconds, int | float):
        start = float(seconds)
        times = [("quantizing", "bar", 0.0, start), ("measuring", "bar pooled", start, times[0][3])]
    return Extras(
        weighted=weighted(report),
        panels=panels(record, path, reference, tell),
        memory=stack(path),
        commands=commands,
        times=times,
        report=report,
    )


def panels(
    record: Mapping[str, Any],
    path: Path,
    reference: Checkpoint,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """The panels of the tensors that the heat map shows, the worst first; none where errors say nothing."""
    if not record["same_basis"]:
        return {}
    shown = {row["name"] for row in cells_of(record).values()}
    names = [row["name"] for row in worst_tensors(record, len(record["tensors"])) if row["name"] in shown]
    return anatomies(open_path(path), reference, names[:MOST_TENSORS], tell)


def report_of(path: Path) -> Mapping[str, Any]:
    """The account of the run that made a file; empty where there is none, or it is not one."""
    file = report_path(path)
    try:
        if file.stat().st_size > _LARGEST:
            return {}
        told: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def weighted(report: Mapping[str, Any]) -> dict[str, float]:
    """Errors of outputs by tensor, as a run's report has them."""
    tensors = report.get("tensors")
    found = tensors.items() if isinstance(tensors, dict) else ()
    errors = {name: error.get("weighted") for name, error in found if isinstance(error, dict)}
    return {name: float(value) for name, value in errors.items() if isinstance(value, int | float)}
