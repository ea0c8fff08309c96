"""Tokens that the experts of a mixture were placed by, a cell an expert; and what had no data at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitmill.pages.parts import listed, panel
from bitmill.pages.svg import WIDTH, svg, text

_LEFT, _RIGHT = 58, 104
_HIGH, _LOW, _MANY = 22, 9, 24  # of a row; where there are more rows than that
_NAMED = 8000  # cells that say their name; more are drawn by shade, each shade as one shape
_SHADES = 12
_LISTED = 60
NO_DATA = "no-importance"
"""Kind of the notes about weights without data."""


def experts(report: Mapping[str, Any]) -> str:
    """The map and the list, from a run's report; nothing without experts and where every weight had data."""
    blocks, lacking = _blocks(report), _list(_lacking(report))
    if not blocks:
        return f"<h2>Weights without data</h2>{panel(lacking)}" if lacking else ""
    sent = all(count is not None for block in blocks for count in block[1])
    counts = [_told(block, sent) for block in blocks]
    every = sorted(count for row in counts for count in row)
    got = "that the router sent each expert" if sent else "that each expert was placed by"
    middle, none = every[len(every) // 2], _count(every.count(0), "expert")
    said = (
        f"Tokens of calibration {got}: experts across, blocks down, stronger is more, red is none. "
        f"{every[0]:,} to {every[-1]:,}, median {middle:,}; {none} had none."
    )
    shown = [list(row) for _, _, row in blocks]
    if sent and shown != counts:
        said += f" The recipe shows experts more than they are sent: {min(map(min, shown)):,} at least."
    whole = lacking or '<p class="quiet">Every weight had data.</p>'
    drawn = f'<div class="scroll">{_map(blocks, counts)}</div>{whole}'
    return f'<h2>Tokens by expert</h2><p class="quiet">{escape(said)}</p>{panel(drawn)}'


_Block = tuple[int, Sequence[int | None], Sequence[int]]


def _blocks(report: Mapping[str, Any]) -> list[_Block]:
    """Number, tokens sent and tokens shown of each block with experts; what is not such a table is left."""
    told = report.get("experts")
    rows = told.get("blocks") if isinstance(told, Mapping) else None
    found: list[_Block] = []
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, Mapping):
            continue
        sent, shown, number = row.get("sent"), row.get("shown"), row.get("block")
        if not isinstance(number, int) or not isinstance(sent, list) or not isinstance(shown, list):
            continue
        counted = all(_is_count(n) for n in shown) and all(n is None or _is_count(n) for n in sent)
        if shown and len(sent) == len(shown) and counted:
            found.append((number, sent, shown))
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _told(block: _Block, sent: bool) -> list[int]:
    return [count or 0 for count in block[1]] if sent else list(block[2])


def _map(blocks: Sequence[_Block], counts: Sequence[Sequence[int]]) -> str:
    """Shades by the logarithm of the count: between one token and a thousand lies all that matters."""
    wide = max(map(len, counts))
    high = _LOW if len(blocks) > _MANY else _HIGH
    width = (WIDTH - _LEFT - _RIGHT) / wide
    most = math.log1p(max(max(row) for row in counts)) or 1.0
    cells: dict[int, list[str]] = {}
    named = sum(map(len, counts)) <= _NAMED
    every = max(1, math.ceil(12 / high))
    parts = []
    for at, ((number, sent, shown), row) in enumerate(zip(blocks, counts, strict=True)):
        y = 4 + at * high
        if at % every == 0:
            parts.append(text(_LEFT - 10, y + high / 2 + 4, str(number), "tick", "end"))
            parts.append(text(WIDTH - 2, y + high / 2 + 4, f"{min(row):,} – {max(row):,}", "tick", "end"))
        for expert, count in enumerate(row):
            shade = math.ceil(_SHADES * math.log1p(count) / most)
            place = (_LEFT + expert * width, y, max(width - 1, 0.6), high - 1)
            said = _said(number, expert, sent[expert], shown[expert]) if named else ""
            cells.setdefault(shade, []).append(_cell(place, said))
    for shade, found in sorted(cells.items()):
        css = "bar" if shade else "broken"
        opacity = 0.08 + 0.92 * shade / _SHADES if shade else 1
        drawn = "".join(found) if named else f'<path d="{"".join(found)}"/>'
        parts.append(f'<g class="{css}" fill-opacity="{opacity:.2f}">{drawn}</g>')
    base = 8 + len(blocks) * high
    step = max(1, math.ceil(wide / 16))
    for expert in range(0, wide, step):
        parts.append(text(_LEFT + (expert + 0.5) * width, base + 12, str(expert), "tick", "middle"))
    return svg(base + 18, parts, "tokens by expert and block; red got none")


def _cell(place: tuple[float, float, float, float], said: str) -> str:
    """A rectangle with its title, or as a piece of a shape."""
    x, y, width, height = place
    if not said:
        return f"M{x:.1f} {y}h{width:.1f}v{height}h-{width:.1f}z"
    size = f'width="{width:.1f}" height="{height}"'
    return f'<rect x="{x:.1f}" y="{y}" {size}><title>{escape(said)}</title></rect>'


def _said(block: int, expert: int, sent: int | None, shown: int) -> str:
    told = "" if sent is None else f", sent {sent:,}"
    more = f", placed by {shown:,}" if sent is None or shown != sent else ""
    return f"block {block}, expert {expert}{told}{more}"


def _lacking(report: Mapping[str, Any]) -> list[str]:
    """Weights that a run had no data for, as its notes name them."""
    notes = report.get("notes")
    found: list[str] = []
    for note in notes if isinstance(notes, list) else ():
        if isinstance(note, Mapping) and note.get("kind") == NO_DATA and isinstance(note.get("where"), str):
            found += note["where"].split("+")
    return found


def _list(names: Sequence[str]) -> str:
    """The weights without data, those of one expert together."""
    if not names:
        return ""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, dot, last = name.removesuffix(".weight").rpartition(".")
        groups.setdefault(head if dot else "", []).append(last)
    lines = [f"{head}: {listed(found)}" for head, found in groups.items()]
    more = f"<li>and {len(lines) - _LISTED:,} more</li>" if len(lines) > _LISTED else ""
    shown = "".join(f'<li class="mono">{escape(line)}</li>' for line in lines[:_LISTED])
    title = f"{_count(len(names), 'weight')} had no data: rounded to nearest, every input alike"
    opened = " open" if len(lines) <= 12 else ""
    return f"<details{opened}><summary>{escape(title)}</summary><ul>{shown}{more}</ul></details>"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"
