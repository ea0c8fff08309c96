"""Memory of running a file, for a slider over contexts: weights, keys and values, one step, the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill.advise.cache_types import cache_type
from bitmill.advise.memory import Model, Wanted, memory
from bitmill.advise.models import as_it_is
from bitmill.core.errors import BitmillError, Refused

_FIRST = 512
_USUAL = 32768  # the longest, where nothing says what a model was trained for
_TYPES = ("f16", "q8_0", "q4_0", "fp8", "int8", "int4")
_START = 8192


def stack(path: Path) -> dict[str, Any] | None:
    """Bytes of each part by type of keys and values and by context; None where it is not known.

    The shape is that of ``bitmill plan FILE --context``, and so are the numbers.
    """
    try:
        model = as_it_is(path)
        types = [name for name in _TYPES if name in model.runtime.types and _goes(model, name)]
        longest = model.shape.trained or _USUAL
        contexts = [_FIRST << i for i in range(32) if _FIRST << i < longest] + [longest]
        table = {name: [_parts(model, name, context) for context in contexts] for name in types}
    except BitmillError:
        return None
    if not table:
        return None
    first = next(iter(table.values()))[0]
    start = max((i for i, context in enumerate(contexts) if context <= _START), default=0)
    return {
        "runtime": model.runtime.name,
        "exact": model.runtime.exact,
        "contexts": contexts,
        "start": start,
        "names": list(first),
        "bytes": {name: [list(parts.values()) for parts in column] for name, column in table.items()},
    }


def _parts(model: Model, kind: str, context: int) -> dict[str, int]:
    wanted = Wanted(context, 1, (cache_type(kind), cache_type(kind)))
    return {part.name: part.bytes_ for part in memory(model, wanted).parts}


def _goes(model: Model, kind: str) -> bool:
    try:
        model.runtime.check((cache_type(kind), cache_type(kind)), model.shape.blocks)
    except Refused:
        return False
    return True
