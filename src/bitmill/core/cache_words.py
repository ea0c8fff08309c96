"""One list of words for how keys and values are stored: the same in a recipe (``cache=``), whose numbers are
then rounded as they would be stored, and behind ``--kv``, which stores them.

A way that looks at one token's head alone can be both. Scales that calibration fixes stand in a file, so that
``--kv`` has none; ways that wait for more tokens, or keep the latest as they are, round nothing by itself.
"""

from __future__ import annotations

from dataclasses import replace

from bitmill.core.caches import KEYS, VALUES, CacheMethod
from bitmill.core.errors import BadRecipe
from bitmill.core.inputs import CACHE_EXAMPLES, CACHES, HELD, InputGrid, find_inputs, is_cache
from bitmill.core.registry import find_cache_method

FIXED = {"fp8": CACHES[0], "fp8-e4m3": CACHES[0], "fp8-head": CACHES[1], "int8-head": CACHES[3]}
"""Short for scales that calibration fixes."""

_BOTH = {"int8": f"{CACHES[2]} (a scale a layer, in the file) or int8-token (a scale a token's head)"}
_HEADS = (64, 128, 96, 80, 256, 32)  # sizes, one of which every method has


def parse_cache(text: str) -> InputGrid:
    """What keys and values are rounded to by ``cache=TEXT``: a grid of theirs, or what comes back from a way
    to store them. ``fp8`` is short for one scale a layer.

    Raises:
        BadRecipe: it names none, or what rounds no token by itself.
    """
    wanted = text.strip().lower()
    if wanted in _BOTH:
        raise BadRecipe(f"cache={wanted} may mean two things", fix=_BOTH[wanted])
    method = None if wanted in FIXED else find_cache_method(wanted)
    grid = find_inputs(FIXED.get(wanted, wanted))
    if grid is not None and is_cache(grid) and (method is None or str(method) == str(grid)):
        return grid
    if method is None:
        known = ", ".join((*CACHE_EXAMPLES, "q4_0-rot", "turboquant-3"))
        raise BadRecipe(f"no cache is stored on {text!r}", fix=f"one of {known}; fp8 is short for the first")
    reason = not_by_token(method)
    if reason is not None:
        raise BadRecipe(
            f"cache={method} cannot be simulated: {reason}",
            fix=f"leave it out of the recipe, and hold the cache so: bitmill run FILE --kv {method}",
        )
    return InputGrid(HELD, 0, "token", scaling=HELD, method=str(method))


def not_by_token(method: CacheMethod) -> str | None:
    """Why this way to store makes no numbers of one token alone, or None."""
    head = next((n for n in _HEADS if method.refuses(n) is None), _HEADS[0])
    layouts = [method.layout(part, head) for part in (KEYS, VALUES)]
    if method.window:
        return f"its latest {method.window} tokens stay in 16 bits until others come"
    if any(layout.run > 1 for layout in layouts):
        return "several tokens of a channel share a step"
    if any(layout.learned for layout in layouts):
        return "it orders channels by the first tokens of each text"
    return None


def held_word(grid: InputGrid) -> str | None:
    """What ``--kv`` calls the way to store exactly the numbers that this grid of keys and values makes; None
    where scales are fixed by calibration."""
    return None if grid.static else str(grid)


def refuses_heads(grid: InputGrid, head: int) -> str | None:
    """Why keys and values of this size cannot be rounded so, or None."""
    if grid.method:
        method = find_cache_method(grid.method)
        return f"no cache is called {grid.method}" if method is None else method.refuses(head)
    fits = not grid.group or head % grid.group == 0
    return None if fits else f"heads of {head} channels have no groups of {grid.group}"


def no_such_scale(word: str) -> str | None:
    """Why ``--kv`` cannot mean a word of recipes, or None where it is no such word or can."""
    grid = find_inputs(FIXED.get(word, word)) if find_cache_method(word) is None else None
    if grid is None or not is_cache(replace(grid, clip=1.0)):
        return None
    return f"the scales of {grid} are fixed by calibration and stand in a file, and this asks for none"
