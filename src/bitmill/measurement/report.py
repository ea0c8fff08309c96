"""A measurement in a terminal: numbers with their uncertainty, worst kind first, nothing that needs a
legend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bitmill.measurement.compare import Comparison

Plain = Mapping[str, Any]
WORST_TENSORS = 8
_UNITS = ("B", "kB", "MB", "GB", "TB")


def give(value: float | None, error: float | None = None) -> str:
    """``x ± y`` with as many digits as ``y`` deserves; ``?`` where there is no number."""
    if value is None:
        return "?"
    if error is None or not math.isfinite(error) or error <= 0:
        return _significant(value)
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > 9:
        return f"{value:.2e} ± {error:.0e}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def percent(value: float | None, error: float | None = None) -> str:
    """A share as a percentage, with its error."""
    if value is None:
        return "?"
    return f"{100 * value:.3g} %" if error is None else f"{give(100 * value, 100 * error)} %"


def half_width(kld: Plain) -> float | None:
    """Half of a 95 % interval."""
    return None if kld["ci95"] is None else (kld["ci95"][1] - kld["ci95"][0]) / 2


def size(bytes_: float) -> str:
    """Bytes in decimal units."""
    value, unit = float(bytes_), _UNITS[0]
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _significant(value: float) -> str:
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -5:
        return f"{value:.2e}"
    if magnitude < -3:
        return f"{value:.{1 - magnitude}f}"
    return f"{value:.{max(0, 3 - magnitude)}f}"


def lines(record: Plain) -> list[tuple[str, str]]:
    """Label and value of each headline number, in the order of the page and of the terminal."""
    kld = record["kld"]
    floor = record["floor_details"]
    flips = record["right_to_wrong"], record["wrong_to_right"]
    linears = record["bpw_linears"]
    share = [100 * f / record["tokens"] for f in flips]
    found = [
        ("size", f"{size(record['bytes'])} (original {size(record['bytes_reference'])})"),
        ("bits per weight", f"{record['bpw']:.3f}" + (f", linears {linears:.3f}" if linears else "")),
        ("KL divergence", f"{give(kld['mean'], half_width(kld))} nats (95 %)"),
        ("  median, p90", f"{give(kld['median'])}, {give(kld['p90'])}"),
        ("  p99, p99.9, max", f"{give(kld['p99'])}, {give(kld['p999'])}, {give(kld['max'])}"),
        ("  noise floor", give(floor["kld"]) if floor else "not measured"),
        ("same first choice", percent(record["same_top"], record["same_top_se"])),
        ("right → wrong", f"{flips[0]} ({share[0]:.2f} %)"),
        ("wrong → right", f"{flips[1]} ({share[1]:.2f} %)"),
        ("RMS Δp", percent(record["rms_dp"], record["rms_dp_se"])),
        ("perplexity", f"{give(record['ppl'], record['ppl_se'])}"),
        ("  original", f"{give(record['ppl_reference'], record['ppl_reference_se'])}"),
        ("  ln ratio", give(record["ln_ppl_ratio"], record["ln_ppl_ratio_se"])),
        ("scored", f"{record['tokens']:,} tokens in {record['windows']} windows"),
    ]
    if record["nonfinite"]:
        found.append(("not a number", f"{percent(record['nonfinite'])} of positions, left out"))
    return found


def table(record: Plain) -> RenderableType:
    """The record for a terminal."""
    title = f"{record['quantized']['name']} against {record['reference']['name']}"
    parts: list[RenderableType] = [Text(title, style="bold"), _headline(record)]
    if len(record["kinds"]) > 1:
        parts.append(_kinds(record))
    if record["same_basis"] and record["tensors"]:
        parts.append(_tensors(record))
    parts += [Text(f"note: {note['text']}", style="yellow") for note in record["notes"]]
    return Group(*parts)


def _headline(record: Plain) -> Table:
    grid = Table.grid(padding=(0, 2))
    for label, value in lines(record):
        grid.add_row(Text(label, style="dim" if label.startswith(" ") else ""), Text(value))
    return grid


def _kinds(record: Plain) -> Table:
    made = Table(title="by kind of text", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for label in ("kind", "KL divergence", "p99", "same choice", "perplexity", "original", "seen before"):
        made.add_column(label, justify="left" if label == "kind" else "right")
    overlap = record["overlap"] or {}
    for kind, found in sorted(record["kinds"].items(), key=lambda item: -item[1]["kld"]["mean"]):
        made.add_row(
            Text(kind + (" (worst)" if kind == record["worst_kind"] else "")),
            give(found["kld"]["mean"], half_width(found["kld"])),
            give(found["kld"]["p99"]),
            percent(found["same_top"], found["same_top_se"]),
            give(found["ppl"]),
            give(found["ppl_reference"]),
            percent(overlap[kind]) if overlap.get(kind) is not None else "unknown",
        )
    return made


def worst_tensors(record: Plain, count: int) -> list[Plain]:
    """The tensors with the largest relative error; one that holds no numbers comes first."""

    def badness(row: Plain) -> float:
        return math.inf if row["relative"] is None else row["relative"]

    return sorted((r for r in record["tensors"] if badness(r) > 0), key=badness, reverse=True)[:count]


def _tensors(record: Plain) -> Table:
    made = Table(title="worst tensors", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for label in ("tensor", "stored as", "bits", "error", "SQNR", "worst place"):
        made.add_column(label, justify="left" if label in ("tensor", "stored as") else "right")
    for row in worst_tensors(record, WORST_TENSORS):
        place = row["place"]
        where = f"row {place['row']}, column {place['column']}: {percent(place['relative'])}"
        bits = row["bits"] / max(math.prod(row["shape"]), 1)
        sqnr = "?" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
        made.add_row(Text(row["name"]), row["grid"], f"{bits:.2f}", percent(row["relative"]), sqnr, where)
    return made


def comparison(found: Comparison) -> RenderableType:
    """Two files, in three lines."""
    width = None if found.ci95 is None else (found.ci95[1] - found.ci95[0]) / 2
    verdict = f"{found.better} is better" if found.better else "no difference beyond chance"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("KL divergence, difference", f"{give(found.kld_difference, width)} (95 %): {verdict}")
    right = f"{found.only_first} and {found.only_second} (McNemar p = {found.mcnemar_p:.3g})"
    grid.add_row("right in one file alone", right)
    grid.add_row("same first choice", percent(found.same_top))
    return Group(Text(f"{found.first} against {found.second}", style="bold"), grid)
