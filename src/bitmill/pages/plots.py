"""The page's pictures as inline SVG: colours come from the page's variables, so that light and dark both
work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitmill.measurement.report import give, half_width
from bitmill.pages.svg import WIDTH, box, line, path, svg, text

Plain = Mapping[str, Any]
_LEFT = 110
SHADES = 10  # colours of curves and of types
_TINY = 1e-7  # nats: below this the axis ends


def kinds(record: Plain) -> str:
    """Mean KLD by kind of text, worst first, with 95 % intervals and the noise floor."""
    rows = sorted(record["kinds"].items(), key=lambda item: -item[1]["kld"]["mean"])
    rows = [*rows, ("all together", record)] if len(rows) > 1 else rows
    top = max((k["kld"]["ci95"] or [0, k["kld"]["mean"]])[1] for _, k in rows) or 1.0
    span, row_height = WIDTH - _LEFT - 190, 34
    scale = span / (top * 1.04)
    parts: list[str] = []
    for i, (name, found) in enumerate(rows):
        y, kld = 12 + i * row_height, found["kld"]
        pooled = name == "all together"
        width = max(kld["mean"] * scale, 1.0)
        parts.append(text(_LEFT - 12, y + 15, name, "label" + (" quiet" if pooled else ""), "end"))
        css = "bar pooled" if pooled else "bar"
        parts.append(box(_LEFT, y, width, 20, css))
        if kld["ci95"]:
            low, high = (_LEFT + v * scale for v in kld["ci95"])
            middle = y + 10
            parts += [line(low, middle, high, middle, "whisker"), line(low, y + 6, low, y + 14, "whisker")]
            parts.append(line(high, y + 6, high, y + 14, "whisker"))
        said = f"{give(kld['mean'], half_width(kld))}"
        parts.append(text(WIDTH - 4, y + 15, said, "number", "end"))
    height = 12 + len(rows) * row_height
    if record["floor"] is not None:
        x = _LEFT + record["floor"] * scale
        parts.append(line(x, 4, x, height, "floor"))
        parts.append(text(x + 4, height + 12, f"noise floor {give(record['floor'])}", "tick"))
    return svg(height + 18, parts, "mean KL divergence by kind of text")


def cumulative(records: Sequence[Plain], names: Sequence[str] = ()) -> str:
    """Share of positions whose KLD is at most x, on a logarithmic axis: one curve a record, and for a single
    one the marks people quote."""
    curves = [[max(v, _TINY) for v in record["curve"]] for record in records]
    floor = records[0]["floor_details"]
    ends = (floor["median"], floor["p99"]) if floor else ()
    values = [v for curve in curves for v in (*curve, *ends) if v > _TINY] or [_TINY, 1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    left, right, top, bottom = 56, WIDTH - 16, 34, 250

    def x(value: float) -> float:
        at = (math.log10(max(value, _TINY)) - low) / (high - low)
        return left + (right - left) * min(max(at, 0.0), 1.0)

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    parts: list[str] = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(left, y(share), right, y(share), "grid"))
        parts.append(text(left - 8, y(share) + 4, f"{share:.0%}", "tick", "end"))
    for power in range(low, high + 1):
        parts.append(line(x(10.0**power), bottom, x(10.0**power), bottom + 4, "axis"))
        parts.append(text(x(10.0**power), bottom + 18, f"{10.0**power:g}", "tick", "middle"))
    if floor:
        start, stop = x(floor["median"]), x(floor["p99"])
        parts.append(box(start, top, max(stop - start, 1), bottom - top, "band"))
        parts.append(text((start + stop) / 2, bottom + 34, "noise floor, median to p99", "tick", "middle"))
    for at, curve in enumerate(curves):
        shade = f"curve c{at % SHADES}" if len(curves) > 1 else "curve"
        parts.append(path([(x(v), y(i / (len(curve) - 1))) for i, v in enumerate(curve)], shade))
    height = bottom + 42.0
    if len(curves) > 1:
        parts += _legend(names, bottom + 58)
        height += 18 + 20 * math.ceil(len(names) / 4)
    else:
        kld = records[0]["kld"]
        for i, name in enumerate(("median", "mean", "p99")):
            lift = top - 8 - 12 * (i == 1)
            parts.append(line(x(kld[name]), lift + 4, x(kld[name]), bottom, "mark"))
            parts.append(text(x(kld[name]), lift, f"{name} {give(kld[name])}", "tick strong", "middle"))
    return svg(height, parts, "cumulative distribution of the KL divergence")


def _legend(names: Sequence[str], y: float) -> list[str]:
    """A line and a name for each curve, four beside each other."""
    parts = []
    for i, name in enumerate(names):
        x, down = 56 + i % 4 * 206, y + i // 4 * 20
        parts.append(line(x, down - 4, x + 22, down - 4, f"curve c{i % SHADES}"))
        parts.append(text(x + 30, down, name if len(name) <= 22 else f"{name[:21]}…", "tick strong"))
    return parts


def confidence(record: Plain) -> str:
    """Mean KLD by how sure the original is of its first choice."""
    buckets = [b for b in record["confidence"] if b["kld"] is not None]
    top = max((b["kld"] for b in buckets), default=0.0) or 1.0
    span = WIDTH - _LEFT - 190
    parts: list[str] = []
    for i, bucket in enumerate(buckets):
        y = 8 + i * 28
        share = bucket["tokens"] / record["tokens"]
        parts.append(text(_LEFT - 12, y + 13, f"{bucket['low']:.0%} – {bucket['high']:.0%}", "label", "end"))
        width = max(bucket["kld"] / top * span, 1.0)
        parts.append(box(_LEFT, y, width, 16, "bar"))
        said = f"{give(bucket['kld'])}  in {share:.0%} of positions"
        parts.append(text(WIDTH - 4, y + 13, said, "number", "end"))
    return svg(12 + 28 * len(buckets), parts, "KL divergence by the original's confidence")


def timeline(rows: Sequence[tuple[str, Sequence[tuple[str, float, float]]]]) -> str:
    """What took how long: a row a thing, in it parts as (class, start, seconds)."""
    end = max((start + took for _, parts in rows for _, start, took in parts), default=0.0) or 1.0
    left, span = 150, WIDTH - 150 - 80
    scale = span / end
    out: list[str] = []
    for i, (name, spans) in enumerate(rows):
        y = 8 + i * 26
        out.append(text(left - 12, y + 13, name if len(name) <= 20 else f"{name[:19]}…", "label", "end"))
        for css, start, took in spans:
            out.append(box(left + start * scale, y, max(took * scale, 1.5), 16, css))
        stop = max((start + took for _, start, took in spans), default=0.0)
        out.append(text(left + stop * scale + 8, y + 13, _clock(sum(took for _, _, took in spans)), "tick"))
    return svg(14 + 26 * len(rows), out, "time of each part")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"
