"""``bitmill recipes``: known names, and the five axes they are points of."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.options import Json

LONGEST, SHOWN = 24, 4  # characters of a grid's spelling, and how many of them a table shows
SENTENCE = "transforms + solver : grid-or-mixture, options > container"


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A recipe or a member of an axis, to read about.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the known recipes and the parts of all others.

    A recipe reads: transforms + solver : grid-or-mixture, options > container. Every transform goes with
    every solver, every grid and every container that can hold it; what cannot work is refused before a
    weight is read.

        bitmill recipes              the tables
        bitmill recipes W4A16        what one name stands for
        bitmill recipes gptq         what one part does, and its options
    """
    if name is not None:
        _one(name, json)
        return
    from bitmill.known import KNOWN

    axes = _axes()
    if json:
        say.emit({"recipes": dict(KNOWN), "axes": axes})
        return
    say.result(f"A recipe is one line:  {SENTENCE}\n")
    say.result(say.table(["name", "stands for"], sorted(KNOWN.items())))
    for axis, parts in axes.items():
        say.result(f"\n{axis}")
        say.result(say.table(["name", "what it is"], [[shown(p), p["summary"]] for p in parts]))
    say.result("\noptions: keep=v+down leaves roles as they are; embed=q8_0 gives a role a grid of its own;")
    say.result("fallback=int8-channel-sym takes the shapes a grid refuses; dtype=bf16 is for what is kept.")


def shown(part: dict[str, Any]) -> str:
    """``gptq(damp=0.01, …)``: the spelling with its options at their defaults."""
    if "spellings" in part:
        short = [text for text in part["spellings"] if len(text) <= LONGEST]
        return f"{part['name']}: {' '.join(short[:SHOWN])}"
    options = ", ".join(f"{key}={value}" for key, value in part["options"].items())
    return f"{part['name']}({options})" if options else part["name"]


def plain(text: str) -> str:
    """A docstring without the marks of its markup."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text).replace("``", "")


def _axes() -> dict[str, list[dict[str, Any]]]:
    from bitmill.core import registry

    return {
        axis: [_part(name, cls) for name, cls in registry.members(axis).items()] for axis in registry.AXES
    }


def _part(name: str, cls: type) -> dict[str, Any]:
    from bitmill.core.axes import Grid

    text = plain(" ".join((cls.__doc__ or "").split()))
    part: dict[str, Any] = {"name": name.replace("_", "-"), "summary": f"{text.split('. ')[0].rstrip('.')}."}
    if issubclass(cls, Grid):
        part["spellings"] = [str(grid) for grid in cls.examples()]
    part["options"] = {
        f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING
    }
    return part


def _one(name: str, json: bool) -> None:
    import inspect
    import sys

    from bitmill.core import registry
    from bitmill.known import KNOWN
    from bitmill.recipe import Call, parse

    key = name.strip().lower()
    for axis in registry.AXES:
        if key.replace("-", "_") in registry.names(axis) and key.replace("_", "-") not in KNOWN:
            cls = registry.member(axis, key)
            about = (sys.modules[cls.__module__].__doc__ or "").strip()
            if json:
                say.emit({"axis": axis, **_part(key, cls), "about": about})
                return
            say.result(f"{shown(_part(key, cls))}   ({axis})\n")
            say.result(plain(f"{about}\n\n{inspect.getdoc(cls) or ''}"))
            return
    recipe = parse(name)
    parts = {
        "recipe": str(recipe),
        "transforms": [str(c) for c in recipe.transforms],
        "solver": str(recipe.solver),
        "tune": "" if recipe.tune is None else str(recipe.tune),
        "grid": recipe.grid,
        "roles": dict(recipe.roles),
        "keep": list(recipe.keep),
        "container": str(Call(recipe.container.replace("_", "-"), recipe.container_options)),
    }
    if json:
        say.emit(parts)
        return
    for part, value in parts.items():
        said = ", ".join(map(str, value)) if isinstance(value, list) else value
        say.result(f"{part:<12}{said or '–'}")
