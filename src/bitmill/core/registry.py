"""Discovery: the members of an axis are the files of its folder; the file name is the public name.

Third parties add members through entry points in the group ``bitmill.<axis>`` whose value is a module.
"""

from __future__ import annotations

import difflib
import inspect
from functools import cache, lru_cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from bitmill.core.axes import Allocation, Container, Grid, Solver, Transform
from bitmill.core.caches import CacheMethod
from bitmill.core.errors import BadRecipe, Refused

AXES: dict[str, type] = {
    "transforms": Transform,
    "grids": Grid,
    "solvers": Solver,
    "allocation": Allocation,
    "containers": Container,
}
_FOLDERS: dict[str, type] = {**AXES, "caches": CacheMethod}


def names(axis: str) -> tuple[str, ...]:
    """Public names of an axis' members, sorted."""
    return tuple(sorted(_modules(axis)))


def member(axis: str, name: str) -> type:
    """The one final class of the file ``name`` of ``axis``.

    Raises:
        BadRecipe: no such file; the message lists what there is and the closest match.
    """
    known = _modules(axis)
    key = name.strip().lower().replace("-", "_")
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(sorted(known))}"
        raise BadRecipe(f"no {axis.rstrip('s')} is called {name!r}", fix=hint)
    return _final_class(axis, import_module(known[key]))


def members(axis: str) -> dict[str, type]:
    """Every member of an axis by name."""
    return {name: member(axis, name) for name in names(axis)}


def parse_grid(text: str) -> Grid:
    """The grid that ``text`` names, whichever file it lives in.

    Raises:
        BadRecipe: no grid knows the text; the message offers the closest spelling.
    """
    wanted = text.strip().lower()
    grid = find_grid(wanted)
    if grid is not None:
        return grid
    spellings = [str(g) for cls in grid_families() for g in cls.examples()]
    close = difflib.get_close_matches(wanted, spellings, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"for example: {', '.join(spellings[:8])}"
    raise BadRecipe(f"no grid is called {text!r}", fix=hint)


def grid_families() -> tuple[type[Grid], ...]:
    """Every grid class, by file name."""
    return tuple(cls for cls in members("grids").values() if issubclass(cls, Grid))


@lru_cache(maxsize=1024)
def find_grid(text: str) -> Grid | None:
    """The grid that this lower-case text names, or None."""
    for cls in grid_families():
        grid = cls.parse(text)
        if grid is not None:
            return grid
    return None


def cache_method(text: str) -> CacheMethod:
    """The way to store keys or values that ``text`` names, whichever file it lives in.

    Raises:
        Refused: there is none; the message lists what there is.
    """
    wanted = text.strip().lower()
    method = find_cache_method(wanted)
    if method is not None:
        return method
    spellings = cache_spellings()
    close = difflib.get_close_matches(wanted, spellings, n=1)
    hint = f"did you mean {close[0]}? There are: " if close else "one of: "
    raise Refused(f"keys and values cannot be stored as {text!r}", fix=hint + ", ".join(spellings))


def cache_spellings() -> tuple[str, ...]:
    """Examples of every way to store keys and values."""
    return tuple(str(method) for cls in _cache_families() for method in cls.examples())


@lru_cache(maxsize=256)
def find_cache_method(text: str) -> CacheMethod | None:
    """The way to store keys or values that this lower-case text names, or None."""
    for cls in _cache_families():
        method = cls.parse(text)
        if method is not None:
            return method
    return None


def _cache_families() -> tuple[type[CacheMethod], ...]:
    return tuple(cls for cls in members("caches").values() if issubclass(cls, CacheMethod))


@cache
def _modules(axis: str) -> dict[str, str]:
    folder = Path(__file__).parent.parent / axis
    found = {
        p.stem: f"bitmill.{axis}.{p.stem}" for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")
    }
    for entry in metadata.entry_points(group=f"bitmill.{axis}"):
        found.setdefault(entry.name.replace("-", "_"), entry.value)
    return found


def _final_class(axis: str, module: ModuleType) -> type:
    base = _FOLDERS[axis]
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, base)
        and c.__module__ == module.__name__
        and not inspect.isabstract(c)
        and not c.__name__.startswith("_")
    ]
    if len(found) != 1:
        listed = ", ".join(c.__name__ for c in found) or "none"
        raise ImportError(f"{module.__name__} must define exactly one public {base.__name__}; found {listed}")
    return found[0]
