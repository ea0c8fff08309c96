"""Size against loss: every file with its interval, the front, the noise floor, the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from bitmill.measurement.report import give, half_width, percent, size
from bitmill.pages.svg import WIDTH, box, decades, line, path, steps, svg, text

Plain = Mapping[str, Any]
Place = Callable[[float], float]
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 20, 372
_LETTER, _LINE = 7.2, 15  # of a label, in the picture's units
_TRIES = ((9, -8), (9, 14), (-9, -8), (-9, 14), (9, -24), (-9, -24), (9, 30), (-9, 30))


def frontier(tiers: Sequence[Plain], floor: float | None, budget: int | None) -> str:
    """The picture.

    Args:
        tiers: plain values with ``name``, ``bytes``, ``kld`` and ``standing``.
        floor: mean KLD of the noise floor: differences below it mean nothing.
        budget: bytes.
    """
    sizes = [t["bytes"] for t in tiers]
    right = max([*sizes, budget or 0]) * 1.06
    left = min(sizes) * 0.9 if min(sizes) > right / 3 else 0.0
    ends = [v for t in tiers for v in (t["kld"]["ci95"] or (t["kld"]["mean"],)) if v > 0]
    values = [*ends, *([floor] if floor else [])] or [1e-4, 1.0]
    low, high = min(values) / 1.4, max(values) * 1.4

    def x(bytes_: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (bytes_ - left) / (right - left)

    def y(kld: float) -> float:
        at = (math.log(max(kld, low)) - math.log(low)) / (math.log(high) - math.log(low))
        return _BOTTOM - (_BOTTOM - _TOP) * at

    parts = _axes(x, y, (left, right), (low, high))
    if floor:
        parts.append(box(_LEFT, y(floor), WIDTH - _LEFT - _RIGHT, _BOTTOM - y(floor), "band"))
        parts.append(text(_LEFT + 6, y(floor) - 5, f"noise floor {give(floor)}", "tick"))
    if budget:
        parts.append(line(x(budget), _TOP, x(budget), _BOTTOM, "budget"))
        anchor = "end" if x(budget) > WIDTH / 2 else "start"
        shift = -6 if anchor == "end" else 6
        parts.append(text(x(budget) + shift, _TOP + 10, f"budget {size(budget)}", "tick strong", anchor))
    front = sorted((t for t in tiers if t["standing"]["front"]), key=lambda t: t["bytes"])
    parts.append(path([(x(t["bytes"]), y(t["kld"]["mean"])) for t in front], "front"))
    spots = [(x(t["bytes"]), y(t["kld"]["mean"])) for t in tiers]
    for tier, spot in zip(tiers, spots, strict=True):
        parts.append(_point(tier, spot, y))
    parts += _labels(tiers, spots)
    return svg(_BOTTOM + 44, parts, "size against KL divergence", "wide")


def _axes(x: Place, y: Place, sizes: tuple[float, float], losses: tuple[float, float]) -> list[str]:
    parts = []
    for loss in decades(*losses):
        parts.append(line(_LEFT, y(loss), WIDTH - _RIGHT, y(loss), "grid"))
        parts.append(text(_LEFT - 8, y(loss) + 4, f"{loss:g}", "tick", "end"))
    for bytes_ in steps(*sizes):
        parts.append(line(x(bytes_), _BOTTOM, x(bytes_), _BOTTOM + 4, "axis"))
        parts.append(text(x(bytes_), _BOTTOM + 18, size(bytes_), "tick", "middle"))
    parts.append(text((WIDTH + _LEFT) / 2, _BOTTOM + 38, "size", "tick", "middle"))
    parts.append(text(4, _TOP - 8, "KL divergence, nats a token (smaller is better)", "tick"))
    return parts


def _point(tier: Plain, spot: tuple[float, float], y: Place) -> str:
    kld, standing, (at, up) = tier["kld"], tier["standing"], spot
    kind = "knee" if standing["knee"] else "on" if standing["front"] else "beaten"
    said = (
        f"{tier['name']}: {size(tier['bytes'])}, KLD {give(kld['mean'], half_width(kld))}, "
        f"same first choice {percent(tier['same_top'])}"
    )
    said += f", beaten by {standing['beaten_by']}" if standing["beaten_by"] else ""
    bar = ""
    if kld["ci95"]:
        low, high = y(kld["ci95"][0]), y(kld["ci95"][1])
        bar = line(at, low, at, high, "whisker") + "".join(
            line(at - 4, end, at + 4, end, "whisker") for end in (low, high)
        )
    radius = 7 if kind == "knee" else 5
    return (
        f'<g class="spot {kind}" tabindex="0" role="img" aria-label="{escape(said)}">'
        f"<title>{escape(said)}</title>{bar}"
        f'<circle cx="{at:.1f}" cy="{up:.1f}" r="{radius}"/></g>'
    )


def _labels(tiers: Sequence[Plain], spots: Sequence[tuple[float, float]]) -> list[str]:
    """Each name beside its point, where it covers no other name or point."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in spots]
    parts = []
    for tier, (x, y) in zip(tiers, spots, strict=True):
        name = tier["name"] if len(tier["name"]) <= 24 else f"{tier['name'][:23]}…"
        width = len(name) * _LETTER
        tries = [(_where(x + dx, y + dy, width, dx < 0), dx, dy) for dx, dy in _TRIES]
        inside = [t for t in tries if t[0][0] > _LEFT and t[0][2] < WIDTH and t[0][1] > 0] or tries
        chosen = next((t for t in inside if not any(_meet(t[0], other) for other in taken)), inside[0])
        where, dx, dy = chosen
        taken.append(where)
        css = "label" if tier["standing"]["front"] else "label quiet"
        parts.append(text(x + dx, y + dy, name, css, "end" if dx < 0 else "start"))
    return parts


def _where(x: float, y: float, width: float, to_the_left: bool) -> tuple[float, float, float, float]:
    start = x - width if to_the_left else x
    return start, y - _LINE + 3, start + width, y + 3


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
