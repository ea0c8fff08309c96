"""The commands that make a file and measure it again, as a page shows them; defaults are left out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitmill.account import Report
    from bitmill.cli.measure import How

_DRAWN = {"nsamples": 128, "seqlen": 512, "seed": 0, "device": "cpu", "imatrix_missing": "plain"}
"""Options of calibration with one value, and their defaults."""


def quantize_command(model: str, report: Report, drawn: Mapping[str, Any], revision: str | None) -> str:
    """``quantize`` for one output, its recipe as it was understood.

    Args:
        drawn: what the run was told of calibration, by the names of :func:`bitmill.quantize`.
    """
    words = ["bitmill", "quantize", model, str(report.plan["recipe"]), "-o", report.path]
    told = report.plan["calibration"]["nsamples"] or drawn["imatrix"] or drawn["moments"]
    words += [word for text in drawn["calib"] or () for word in ("--calib", text)]
    words += [word for path in drawn["imatrix"] for word in ("--imatrix", str(path))]
    words += ["--moments", str(drawn["moments"])] if drawn["moments"] is not None else []
    for name, usual in _DRAWN.items() if told else ():
        value = drawn[name]
        words += [f"--{name.replace('_', '-')}", str(value)] if value and value != usual else []
    words += ["--chat"] * bool(drawn["chat"])
    return shlex.join([*words, *_revision(revision)])


def measure_command(files: Sequence[str], against: str, how: How) -> str:
    """``measure`` for files that were measured together."""
    words = ["bitmill", "measure", *files, "--against", against]
    words += [word for text in how.text or () for word in ("--text", text)]
    for name, value, usual in (
        ("--window", how.window, type(how).window),
        ("--windows", how.windows, type(how).windows),
        ("--seed", how.seed, type(how).seed),
        ("--device", how.device, type(how).device),
    ):
        words += [name, str(value)] if value != usual else []
    flags = {"--all-positions": how.every, "--chat": how.chat, "--no-floor": not how.floor}
    words += [flag for flag, given in flags.items() if given]
    return shlex.join([*words, *_revision(how.revision)])


def reported_command(report: Mapping[str, Any], model: str, path: Path) -> str | None:
    """``quantize`` for a file that a run's report lies beside, as far as that knows; None where it says no
    recipe."""
    plan, drawn = report.get("plan"), report.get("calibration")
    recipe = plan.get("recipe") if isinstance(plan, dict) else None
    if not isinstance(plan, dict) or not isinstance(recipe, str):
        return None
    words = ["bitmill", "quantize", model, recipe, "-o", path.name]
    windows = plan.get("calibration")
    told = {**(drawn if isinstance(drawn, dict) else {}), **(windows if isinstance(windows, dict) else {})}
    for name in ("nsamples", "seqlen", "seed"):
        value = told.get(name)
        words += (
            [f"--{name}", str(value)] if isinstance(value, int) and value not in (0, _DRAWN[name]) else []
        )
    return shlex.join(words)


def _revision(revision: str | None) -> list[str]:
    return [] if revision is None else ["--revision", revision]
