"""The studio's page: what is known of the model when it opens, and the places that the script fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from bitmill.advise.models import as_it_is
from bitmill.core.errors import BitmillError
from bitmill.core.registry import grid_families
from bitmill.measurement.report import size
from bitmill.pages.memory import stack
from bitmill.pages.parts import panel, rows
from bitmill.pages.record import memory_of
from bitmill.pages.shell import Live
from bitmill.pages.shell import page as whole
from bitmill.studio.desk import ROWS
from bitmill.studio.line import GROUPS, LARGEST_OUTLIER, SHOWN, ZEROS
from bitmill.studio.widths import Width, widths

_SCRIPTS = ("explore.js", "numbers.js")
_BAR = 24  # signs of a bar in the table of caches


@dataclass(frozen=True)
class Contents:
    """What a studio shows.

    Attributes:
        title, lead: what is open, unescaped.
        made: the part about a file of Bitmill's, markup; empty where there is none.
        cells: of its map.
        blocks: names of the blocks that hold matrices; empty where no model is open.
        file: the model's file or folder.
        caches: how wide keys and values are, and for how many tokens.
    """

    title: str
    lead: str
    made: str = ""
    cells: Mapping[str, Any] = field(default_factory=dict)
    blocks: Sequence[str] = ()
    file: Path | None = None
    caches: tuple[Sequence[Width], int] = ((), 0)


def page(found: Contents) -> str:
    """The page, which asks the server that sent it and nobody else."""
    memory = None if found.file is None else stack(found.file)
    body = "".join(
        (
            f'<h1>{escape(found.title)}</h1><p class="lead">{escape(found.lead)}</p>',
            found.made,
            _explorer() if found.blocks else "",
            _numbers(),
            memory_of([found.title] if memory else []),
            _caches(*found.caches),
        )
    )
    data = {
        "live": True,
        "heat": found.cells,
        "files": [found.title],
        "memory": [memory] if memory else [],
        "blocks": list(found.blocks),
        "groups": list(GROUPS),
        "grids": _grids(),
    }
    style, *scripts = (
        (Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("studio.css", *_SCRIPTS)
    )
    said = "This page comes from the program in your terminal, and asks nobody else. Ctrl-C there ends it."
    return whole(f"{found.title}: studio", body, data, live=Live(style, "".join(scripts), said))


def _grids() -> list[tuple[str, list[str]]]:
    """Every family of grids by file name, with its examples."""
    return [
        (cls.__module__.rpartition(".")[2].replace("_", " "), [str(grid) for grid in cls.examples()])
        for cls in grid_families()
    ]


def _explorer() -> str:
    """A tensor on a grid: choices, sliders, and the places of what they give."""
    return (
        "<h2>A tensor on a grid</h2>"
        '<p class="quiet">Weights of this model, rounded by the very code that quantizes files.</p>'
        '<div class="panel" id="explore"><div class="choices">'
        f"{_select('block', 'block', ())}{_select('weight', 'tensor', ())}"
        f"{_count('row', 'row', 0)}{_count('column', 'from column', 0)}"
        f"{_select('shown', 'shown', SHOWN, 1)}{_select('rows', 'rows rounded together', ROWS, 1)}</div>"
        '<div class="choices">'
        '<label>grid <select id="grid"></select></label>'
        '<label id="named" hidden>its name <input id="name" type="text" maxlength="300" size="24" '
        'spellcheck="false" autocomplete="off" placeholder="int4-g32-asym-z1"></label>'
        f"{_slider('bits', 'bits', 2, 8, 4)}{_slider('group', 'group', 0, len(GROUPS) - 1, 2)}"
        f"{_select('zero', 'zero', ZEROS, 0)}</div>"
        '<div class="choices">'
        f"{_slider('outlier', 'outlier', 0, int(LARGEST_OUTLIER), 0)}{_count('at', 'at column', 0)}"
        '<label><input id="turn" type="checkbox"> rotate first (Hadamard)</label></div>'
        '<p id="trouble" class="note" role="alert" hidden></p>'
        '<div id="verdict" class="cards" aria-live="polite"></div>'
        '<div id="line"></div><div id="codes"></div><div id="beside" class="beside"></div>'
        '<div id="inside"></div></div>'
        "<h3>Every grid on these rows</h3>"
        '<p class="quiet">All that fit, by plain rounding: no calibration, which is what separates methods '
        "on one grid.</p>"
        '<div class="panel"><button type="button" id="compare">compare them</button>'
        '<div id="compared" aria-live="polite"></div></div>'
    )


def _numbers() -> str:
    return (
        "<h2>A number, bit by bit</h2>"
        '<p class="quiet">Floats first; then the same number in blocks that share a scale.</p>'
        '<div class="panel" id="numbers"><div class="choices">'
        '<label>number <input id="text" type="text" inputmode="decimal" maxlength="100" size="16" '
        'value="0.1" spellcheck="false" autocomplete="off"></label>'
        '<label>largest of its block <input id="largest" type="number" min="0" step="any" value="1">'
        "</label></div>"
        '<p id="number-trouble" class="note" role="alert" hidden></p>'
        '<div id="digits" aria-live="polite"></div></div>'
    )


def _caches(found: Sequence[Width], tokens: int) -> str:
    """How much a conversation takes in each kind of cache."""
    good = [width for width in found if not width.why]
    if not good:
        return ""
    top = max(width.bytes_ for width in good) or 1
    lines = [
        (
            width.name,
            "▪" * max(1, round(_BAR * width.bytes_ / top)),
            f"{width.keys:g}",
            f"{width.values:g}",
            size(width.bytes_),
        )
        for width in good
    ]
    header = ("--kv", "", "bits a key", "bits a value", f"{tokens:,} tokens")
    left = [f"{width.name}: {width.why}" for width in found if width.why]
    more = f'<p class="quiet">Not with these heads: {escape("; ".join(left))}</p>' if left else ""
    return (
        "<h2>Widths of the cache</h2>"
        '<p class="quiet">Keys and values of one conversation as <code>bitmill run</code> holds them, scales '
        "and the tokens that wait in 16 bits included.</p>"
        f'<div class="widths">{panel(rows(header, lines, left=2))}</div>{more}'
    )


def caches_of(file: Path, tokens: int) -> tuple[Sequence[Width], int]:
    """The table's values for the model in a file; none where its shape is not known."""
    try:
        shape = as_it_is(file).shape
    except BitmillError:
        return (), 0
    many = min(tokens, shape.trained or tokens)
    return widths(shape, many), many


def _select(id_: str, label: str, values: Sequence[object], chosen: int = 0) -> str:
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if i == chosen else ""}>{escape(value)}</option>'
        for i, value in enumerate(map(str, values))
    )
    return f'<label>{escape(label)} <select id="{id_}">{options}</select></label>'


def _count(id_: str, label: str, value: int) -> str:
    return f'<label>{escape(label)} <input id="{id_}" type="number" min="0" step="1" value="{value}"></label>'


def _slider(id_: str, label: str, low: int, high: int, value: int) -> str:
    return (
        f'<label class="slide">{escape(label)} <input type="range" id="{id_}" min="{low}" max="{high}" '
        f'step="1" value="{value}"><output id="{id_}-said"></output></label>'
    )
