"""What things hold in memory, counted tensor by tensor from the things themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def held_bytes(*things: object) -> int:
    """Bytes of all tensors and arrays that can be reached through attributes, lists and tables.

    Memory that several share counts once, and whole: room that was taken and is not filled yet is held, too.
    Modules and configurations of models are not gone into.
    """
    found: dict[int, int] = {}
    met: set[int] = set()
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        if id(thing) in met or isinstance(thing, (str, bytes, int, float, type, torch.nn.Module)):
            continue
        met.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, np.ndarray):
            owner = _owner(thing)
            found[owner.ctypes.data] = owner.nbytes
        else:
            waiting += _inside(thing)
    return sum(found.values())


def _inside(thing: object) -> list[Any]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    try:
        return list(vars(thing).values())
    except TypeError:  # it has no attributes of its own
        return []


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
