"""A model opened in the studio: its page, and what answers the page's questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from bitmill.core.axes import Checkpoint
from bitmill.studio.asked import Asked
from bitmill.studio.desk import Desk
from bitmill.studio.digits import FIELDS as NUMBER_FIELDS
from bitmill.studio.digits import number
from bitmill.studio.line import FIELDS as LINE_FIELDS
from bitmill.studio.line import compare, on_grid
from bitmill.studio.made import Made, made, sections
from bitmill.studio.page import Contents, caches_of, page
from bitmill.studio.server import Answers

CONTEXT = 8192
"""Tokens that the table of caches is for, where the model was trained for as many."""

_LONGEST = 300


def opened(
    model: Checkpoint | None, original: Checkpoint | None = None, again: Sequence[str] = ()
) -> Answers:
    """What a studio says of a model, or, without one, of numbers alone.

    Args:
        original: what the model was made from: its tensors are those to be rounded then, and the model's own
            report can show weights before and after.
        again: commands that make and measure the model again, for a reader to copy.
    """
    asks: dict[str, Callable[[bytes], Mapping[str, Any]]] = {"number": _with(NUMBER_FIELDS, number)}
    if model is None:
        return Answers(
            page(Contents("Bitmill studio", "no model is open: bitmill studio MODEL opens one")), asks
        )
    desk = Desk(original or model)
    asks["line"] = _with(LINE_FIELDS, partial(on_grid, desk))
    asks["compare"] = _with(LINE_FIELDS, partial(compare, desk))
    asks["tensors"] = _with(("block", "having"), partial(_matrices, desk))
    found = made(model.path, model, original)
    body, cells = ("", {}) if found is None else sections(found, again)
    if found is not None:
        asks["panel"] = _with(("tensor",), partial(_panel, found))
    contents = Contents(
        title=model.path.name,
        lead=lead(model, original),
        made=body,
        cells=cells,
        blocks=desk.blocks,
        file=model.path,
        caches=caches_of(model.path, CONTEXT),
    )
    return Answers(page(contents), asks)


def lead(model: Checkpoint, original: Checkpoint | None = None) -> str:
    """What is open, in a line."""
    desk = original or model
    weights = sum(prod(facts.shape) for facts in desk.tensors.values())
    said = f"{model.config.get('model_type', '?')}, {weights:,} weights in {len(desk.tensors)} tensors"
    return said if original is None else f"{said}, read from {original.path.name}"


def _with(
    fields: tuple[str, ...], answer: Callable[[Asked], Mapping[str, Any]]
) -> Callable[[bytes], Mapping[str, Any]]:
    """``answer`` to a body that has these fields and no other."""
    return lambda body: answer(Asked.read(body, fields))


def _matrices(desk: Desk, asked: Asked) -> Mapping[str, Any]:
    return desk.matrices(asked.word("block", _LONGEST), asked.word("having", _LONGEST))


def _panel(found: Made, asked: Asked) -> Mapping[str, Any]:
    return found.panel(asked.word("tensor", _LONGEST))
