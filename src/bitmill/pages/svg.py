"""Pieces of inline pictures: colours come from the page's variables, so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 880


def text(x: float, y: float, said: str, css: str = "", anchor: str = "start") -> str:
    """An escaped label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(said)}</text>'


def svg(height: float, parts: Sequence[str], label: str, css: str = "") -> str:
    """The picture, :data:`WIDTH` wide."""
    mark = f' class="{css}"' if css else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}"{mark}>'
        f"{''.join(parts)}</svg>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """From one point to another."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def box(x: float, y: float, width: float, height: float, css: str) -> str:
    """A rectangle with soft corners."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" class="{css}"/>'


def path(points: Sequence[tuple[float, float]], css: str) -> str:
    """A line through points."""
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{css}"/>'


def steps(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two, about ``count`` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two numbers; powers alone where that is many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0, 2.0, 5.0) if last - first <= 3 else (1.0,)
    found = [f * 10.0**p for p in range(first, last + 1) for f in factors]
    return [v for v in found if low * 0.999 <= v <= high * 1.001]
