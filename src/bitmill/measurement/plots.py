"""The page's pictures as inline SVG: colours come from the page's variables, so that light and dark both
work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitmill.measurement.report import give, half_width, percent

Plain = Mapping[str, Any]
WIDTH = 880
_LEFT = 110
_ROLE_ORDER = ("q", "k", "v", "o", "gate", "up", "down", "linear")
_TINY = 1e-7  # nats: below this the axis ends


def text(x: float, y: float, said: str, css: str = "", anchor: str = "start") -> str:
    """An escaped label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(said)}</text>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _box(x: float, y: float, width: float, height: float, css: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" class="{css}"/>'


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
        parts.append(_box(_LEFT, y, width, 20, css))
        if kld["ci95"]:
            low, high = (_LEFT + v * scale for v in kld["ci95"])
            middle = y + 10
            parts += [_line(low, middle, high, middle, "whisker"), _line(low, y + 6, low, y + 14, "whisker")]
            parts.append(_line(high, y + 6, high, y + 14, "whisker"))
        said = f"{give(kld['mean'], half_width(kld))}"
        parts.append(text(WIDTH - 4, y + 15, said, "number", "end"))
    height = 12 + len(rows) * row_height
    if record["floor"] is not None:
        x = _LEFT + record["floor"] * scale
        parts.append(_line(x, 4, x, height, "floor"))
        parts.append(text(x + 4, height + 12, f"noise floor {give(record['floor'])}", "tick"))
    return _svg(height + 18, parts, "mean KL divergence by kind of text")


def cumulative(record: Plain) -> str:
    """Share of positions whose KLD is at most x, on a logarithmic axis, with the marks people quote."""
    curve = [max(v, _TINY) for v in record["curve"]]
    floor = record["floor_details"]
    marks = [
        ("median", record["kld"]["median"]),
        ("mean", record["kld"]["mean"]),
        ("p99", record["kld"]["p99"]),
    ]
    values = [v for v in (*curve, *((floor["median"], floor["p99"]) if floor else ())) if v > _TINY] or [
        _TINY,
        1.0,
    ]
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
        parts.append(_line(left, y(share), right, y(share), "grid"))
        parts.append(text(left - 8, y(share) + 4, f"{share:.0%}", "tick", "end"))
    for power in range(low, high + 1):
        parts.append(_line(x(10.0**power), bottom, x(10.0**power), bottom + 4, "axis"))
        parts.append(text(x(10.0**power), bottom + 18, f"{10.0**power:g}", "tick", "middle"))
    if floor:
        start, stop = x(floor["median"]), x(floor["p99"])
        parts.append(_box(start, top, max(stop - start, 1), bottom - top, "band"))
        parts.append(text((start + stop) / 2, bottom + 34, "noise floor, median to p99", "tick", "middle"))
    points = " ".join(f"{x(v):.1f},{y(i / (len(curve) - 1)):.1f}" for i, v in enumerate(curve))
    parts.append(f'<polyline points="{points}" class="curve"/>')
    for i, (name, value) in enumerate(marks):
        lift = top - 8 - 12 * (i == 1)
        parts.append(_line(x(value), lift + 4, x(value), bottom, "mark"))
        parts.append(text(x(value), lift, f"{name} {give(value)}", "tick strong", "middle"))
    return _svg(bottom + 42, parts, "cumulative distribution of the KL divergence")


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
        parts.append(_box(_LEFT, y, width, 16, "bar"))
        said = f"{give(bucket['kld'])}  in {share:.0%} of positions"
        parts.append(text(WIDTH - 4, y + 13, said, "number", "end"))
    return _svg(12 + 28 * len(buckets), parts, "KL divergence by the original's confidence")


def layers(record: Plain) -> str:
    """Relative error of every linear weight: roles down, blocks across, darker is farther from the
    original."""
    cells = {
        (t["role"], t["layer"]): t
        for t in record["tensors"]
        if t["layer"] is not None and t["role"] in _ROLE_ORDER
    }
    roles = [r for r in _ROLE_ORDER if any(key[0] == r for key in cells)]
    numbers = sorted({layer for _, layer in cells})
    errors = [t["relative"] for t in cells.values() if t["relative"] is not None]
    if not roles or not errors:
        return ""
    low, high = min(errors), max(errors)
    span = (high - low) or high or 1.0
    left = 58
    width = (WIDTH - left) / len(numbers)
    parts: list[str] = []
    for i, role in enumerate(roles):
        parts.append(text(left - 10, 20 + i * 24, role, "label", "end"))
        for j, layer in enumerate(numbers):
            cell = cells.get((role, layer))
            if cell is None:
                continue
            broken = cell["relative"] is None
            shade = 1.0 if broken else 0.1 + 0.9 * (cell["relative"] - low) / span
            said = f"{cell['name']}: {percent(cell['relative'])}, {cell['grid']}"
            x, css = left + j * width, "cell broken" if broken else "cell"
            parts.append(
                f'<rect x="{x:.1f}" y="{6 + i * 24}" width="{max(width - 2, 1):.1f}" height="21" rx="2" '
                f'class="{css}" fill-opacity="{shade:.3f}"><title>{escape(said)}</title></rect>'
            )
    base = 6 + len(roles) * 24
    every = max(1, math.ceil(len(numbers) / 16))
    for j, layer in enumerate(numbers):
        if j % every == 0:
            parts.append(text(left + (j + 0.5) * width - 1, base + 14, str(layer), "tick", "middle"))
    parts += _legend(left, base + 26, low, high)
    return _svg(base + 46, parts, "relative error by role and block")


def _legend(x: float, y: float, low: float, high: float) -> list[str]:
    parts = [text(x, y + 12, percent(low), "tick")]
    start = x + 56
    for i in range(24):
        parts.append(
            f'<rect x="{start + i * 7:.1f}" y="{y + 2}" width="7" height="12" class="cell" '
            f'fill-opacity="{0.1 + 0.9 * i / 23:.3f}"/>'
        )
    parts.append(text(start + 24 * 7 + 8, y + 12, f"{percent(high)} relative error", "tick"))
    return parts
