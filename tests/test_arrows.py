"""The import arrows: strictly downward, never between members of one axis, no cycles anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "bitmill"
AXES = ("transforms", "grids", "solvers", "allocation", "containers")
STRANGERS = (*AXES, "caches")

_BASE = {"core"}
_NUMERIC = _BASE | {"numerics"}
_FACTS = _NUMERIC | {"families", "checkpoint"}
_PLANNED = _FACTS | {
    "known",
    "recipe",
    "source",
    "calibrate",
    "forecast",
    "inputs",
    "caching",
    "gguf_options",
    *AXES,
}
_MILLED = _PLANNED | {"planning", "journal", "folding", "fitting", "account"}

ARROWS: dict[str, set[str]] = {
    "core": set(),
    "numerics": _BASE,
    "caches": _NUMERIC,
    "families": _NUMERIC,
    "checkpoint": _NUMERIC,
    "grids": _NUMERIC,
    "transforms": _NUMERIC,
    "solvers": _NUMERIC,
    "allocation": _NUMERIC,
    "folding": _NUMERIC | {"families"},
    "fitting": _NUMERIC | {"families", "folding", "calibrate"},
    "calibrate": _FACTS | {"run"},
    "containers": _FACTS | {"grids"},
    "source": _FACTS,
    "known": _NUMERIC | {"allocation"},
    "recipe": _NUMERIC | {"allocation", "gguf_options", "known"},
    "gguf_options": _BASE | {"allocation"},
    "forecast": _BASE,
    "inputs": _NUMERIC | {"families"},
    "caching": _NUMERIC | {"families"},
    "journal": _BASE,
    "tuning_plan": _NUMERIC | {"forecast", "recipe", "run"},
    "held_out": _BASE | {"calibrate", "tuning_plan"},
    "folding_plan": _NUMERIC | {"families", "folding", "forecast", "recipe"},
    "planning": _PLANNED | {"tuning_plan", "folding_plan", "expert_coverage", "trust"},
    "lots": _FACTS | {"calibrate"},
    "market": _PLANNED | {"planning", "lots"},
    "budgeting": _PLANNED | {"planning", "lots", "market"},
    "relabel": _NUMERIC | {"grids"},
    "expert_coverage": _NUMERIC | {"families", "recipe"},
    "account": _BASE | {"expert_coverage"},
    "placing": _MILLED - {"folding", "fitting"},
    "walk": _MILLED | {"placing"},
    "moved": _NUMERIC,
    "distilled": _MILLED | {"walk", "relabel", "tuning_plan", "moved"},
    "tuning": _MILLED | {"walk", "distilled", "moved", "held_out", "run"},
    "rotating": _MILLED | {"walk", "tuning", "held_out", "folding_plan"},
    "timing": _MILLED | {"walk"},
    "mill": _MILLED | {"walk", "tuning", "rotating"},
    "training": _MILLED | {"walk"},
    "adapters": _MILLED | {"mill", "walk", "training"},
    "ternary": _MILLED | {"mill", "run", "walk", "training"},
    "substitutes": _NUMERIC | {"grids", "relabel"},
    "conversion": _PLANNED | {"planning", "relabel", "substitutes", "trust"},
    "transfer": _MILLED | {"mill", "walk", "conversion", "relabel"},
    "several": _MILLED | {"mill", "walk", "transfer", "tuning", "rotating"},
    "run": _FACTS | {"source"},
    "trust": _FACTS | {"source", "calibrate"},
    "advise": _PLANNED | {"planning", "run", "trust"},
    "measurement": _MILLED | {"mill", "run"},
    "sweep": _MILLED | {"mill", "several", "measurement", "advise", "pages"},
    "pages": _BASE | {"measurement", "advise", "journal", "source"},
    "studio": _FACTS | {"grids", "journal", "measurement", "advise", "pages"},
    "cli": _MILLED
    | {
        "mill",
        "transfer",
        "several",
        "conversion",
        "run",
        "measurement",
        "budgeting",
        "lots",
        "advise",
        "sweep",
        "pages",
        "studio",
        "adapters",
        "ternary",
        "training",
        "trust",
        "expert_coverage",
        "timing",
    },
    "__main__": {"cli"},
    "": set(),  # bitmill/__init__.py names modules as text, and imports none
}
"""Who may import whom, by the first name under ``bitmill``."""


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(["bitmill", *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def imports(path: Path, *, annotations: bool = True) -> Iterator[str]:
    """Dotted names of the package's own modules that ``path`` imports, wherever the import stands.

    ``annotations=False`` leaves out what is imported under ``if TYPE_CHECKING``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unread: set[int] = set()
    if not annotations:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                unread |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides the arrow"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def unit(module: str) -> str:
    """The first name under ``bitmill``: a folder or a top-level module."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    home = unit(module)
    assert home in ARROWS, f"{module}: add it to the table of arrows, with what it may import"
    for target in imports(MODULES[module]):
        if target.partition(".")[0] != "bitmill" or target == "bitmill":
            continue
        there = unit(target)
        if there == home:
            part = target.rpartition(".")[2].startswith("_")  # a private file is a part of its one member
            assert part or home not in STRANGERS, (
                f"{module} imports {target}: members of one axis are strangers"
            )
        else:
            assert there in ARROWS[home], (
                f"{module} imports {target}: {home} may import {sorted(ARROWS[home])}"
            )


def test_a_private_file_of_an_axis_has_one_owner() -> None:
    for axis in STRANGERS:
        inside = {name: path for name, path in MODULES.items() if unit(name) == axis}
        for name in inside:
            if name.rpartition(".")[2].startswith("_"):
                public = [
                    n
                    for n, p in inside.items()
                    if name in imports(p) and not n.rpartition(".")[2].startswith("_")
                ]
                assert len(public) == 1, (
                    f"{name} is shared by {public}: it belongs into numerics or checkpoint"
                )


def test_no_cycles() -> None:
    edges = {
        name: {t for t in imports(path, annotations=False) if t in MODULES and t != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_table_itself_has_no_cycle() -> None:
    for home, targets in ARROWS.items():
        for target in targets:
            assert home not in ARROWS[target], f"{home} and {target} may import each other"


def test_the_table_names_only_what_exists() -> None:
    assert {name for name in ARROWS if name} == {unit(m) for m in MODULES if unit(m)}
