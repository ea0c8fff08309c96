"""One picture: tokens a second against layers on a card, as the model of the cliff has it, as an SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, HEIGHT = 880, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 64, 72
_STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #1a1d21 }
.title { font-size: 17px; font-weight: 600 }
.quiet { fill: #656d76 }
.paper { fill: #fff }
.band { fill: #2f6fde; fill-opacity: .22 }
.line { stroke: #2f6fde; stroke-width: 2 }
.out { fill: #c0392b; fill-opacity: .08 }
.axis { stroke: #d0d7de }
.mark { stroke: #c0392b; stroke-dasharray: 5 4; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .quiet { fill: #9198a1 }
  .paper { fill: #0d1117 }
  .axis { stroke: #3d444d }
}
</style>"""


def cliff_svg(record: Mapping[str, Any]) -> str:
    """The picture of a plan's ``memory`` record: a band from the low to the high end, and where room ends.

    Args:
        record: as ``bitmill plan --json`` has it under ``memory``: ``speed``, ``runtime`` and
            so on.
    """
    speed = record["speed"]
    splits = speed["splits"]
    of = splits[-1]["of"]
    top = _round_up(max(split["tokens_per_second"][1] for split in splits))

    def x(layers: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * layers / of

    def y(rate: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * rate / top

    parts = [_STYLE, f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>']
    said = f"{record['runtime']} on {record['machine']['said']}, context {record['context']:,}"
    parts.append(_text(_LEFT, 26, "Tokens a second by layers on the card", "title"))
    parts.append(_text(_LEFT, 47, f"{said}; modelled, low to high", "quiet"))
    for i in range(5):
        rate = top * i / 4
        parts.append(_line(_LEFT, y(rate), WIDTH - _RIGHT, y(rate), "axis"))
        parts.append(_text(_LEFT - 10, y(rate) + 5, f"{rate:g}", "quiet", "end"))
    step = max(1, -(-of // 12))
    for layers in range(0, of + 1, step):
        parts.append(_text(x(layers), HEIGHT - _BOTTOM + 22, str(layers), "quiet", "middle"))
    parts.append(_text((WIDTH + _LEFT) / 2, HEIGHT - 18, f"layers on the card, of {of}", "quiet", "middle"))
    fits = speed["layers_that_fit"]
    if fits is None or fits < of:
        start = x(fits or 0)
        parts.append(
            f'<rect x="{start:.1f}" y="{_TOP}" width="{x(of) - start:.1f}" '
            f'height="{HEIGHT - _TOP - _BOTTOM}" class="out"/>'
        )
        parts.append(_line(start, _TOP, start, HEIGHT - _BOTTOM, "mark"))
        label = "no room" if fits is None else f"room for {fits}"
        parts.append(_text(start + 8, _TOP + 18, label))
    low = [(x(s["layers"]), y(s["tokens_per_second"][0])) for s in splits]
    high = [(x(s["layers"]), y(s["tokens_per_second"][1])) for s in splits]
    parts.append(f'<polygon class="band" points="{_points([*high, *reversed(low)])}"/>')
    parts += [f'<polyline class="line" fill="none" points="{_points(edge)}"/>' for edge in (low, high)]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{escape(said)}">\n{body}\n</svg>\n'
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    unit = 1.0
    while unit * 10 <= value:
        unit *= 10
    while unit > value:
        unit /= 10
    return next(unit * k for k in (1, 2, 4, 6, 8, 10) if unit * k >= value)


def _text(x: float, y: float, said: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(said)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _points(pairs: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)
