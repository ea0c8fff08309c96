"""What a plan says of the cache of keys and values: which scales a file gets, and what they are.

A scale of a cache is a row like any other, though no tensor of the model: calibration fixes it, by the
largest key or value that the quantized block makes of its own inputs. Where scales come with each token, the
row stands for the rounding alone. Blocks behind it are calibrated on keys and values as they come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from bitmill.core.axes import Checkpoint, Container, InputContainer, cache_of, torch_dtype
from bitmill.core.cache_words import held_word, parse_cache, refuses_heads
from bitmill.core.errors import Refused, Unsolvable
from bitmill.core.inputs import InputGrid
from bitmill.core.registry import parse_grid
from bitmill.core.types import Inputs, Params, Row
from bitmill.families.base import head_dim, traits
from bitmill.numerics.cache import KEYS, VALUES
from bitmill.numerics.inputs import fixed_params
from bitmill.numerics.linear_maps import Hadamard

ROLE = "cache"


def with_cache(
    rows: Sequence[Row], text: str | None, container: Container, called: str, config: Mapping[str, Any]
) -> tuple[Row, ...]:
    """The rows, and those of the scales that a recipe's ``cache=`` asks for.

    Args:
        text: the grid of keys and values; None leaves them.
        called: the container's name.

    Raises:
        Refused: no file of this container says that, or no attention is known in this model.
    """
    if text is None:
        return tuple(rows)
    grid = parse_cache(text)
    reason = _unable(container, grid)
    if reason is not None:
        raise Refused(f"{called} files do not say that keys and values are rounded to {grid}: {reason}")
    found = [
        (row.name.removesuffix(".weight").rpartition(".")[0], row.layer) for row in rows if row.role == "v"
    ]
    head = head_dim(config) if found else 0
    unfit = refuses_heads(grid, head) if found else None
    if unfit is not None:
        raise Refused(unfit, fix=f"drop cache={text}")
    if not found:
        raise Refused(
            f"where {config.get('model_type')!r} makes its keys and values is not known here",
            fix=f"drop cache={text}",
        )
    made = [
        _row(f"{attention}.{part}", layer, grid, config, f"cache={text}")
        for attention, layer in found
        for part in (KEYS, VALUES)
    ]
    return (*rows, *made)


def with_stored_cache(
    rows: Sequence[Row], container: Container, source: Checkpoint
) -> tuple[tuple[Row, ...], list[str]]:
    """The rows, and those of the scales that the source has; a remark where the file cannot say them."""
    known, made = cache_of(source), []
    layers = {row.name.rpartition(".")[0].rpartition(".")[0]: row.layer for row in rows}
    left: Counter[str] = Counter()
    for name, how in known.items():
        if how.basis is None and _unable(container, how.grid) is None:
            layer = layers.get(name.rpartition(".")[0])
            made.append(_row(name, layer, how.grid, source.config, "as stored"))
        else:
            left[str(how)] += 1
    remarks = [
        f"keys and values are rounded to {grid} in the source's cache ({n} scales); this output does not say "
        "so"
        for grid, n in left.items()
    ]
    return (*rows, *made), remarks


def cache_remarks(rows: Sequence[Row], source: Checkpoint) -> tuple[str, ...]:
    """What a reader of the plan must know of the cache: what goes into it, and what the source's does that is
    not taken over."""
    remarks = []
    grids = {row.cache for row in rows if row.cache is not None}
    for grid in grids:
        said = "" if grid.static and grid.element != "int" else "; no other engine is known to run it"
        held = held_word(grid)
        said = f"; bitmill run holds it so (--kv {held})" + said if held else said
        scales = "calibration fixes their scales" if grid.static else "their scales come with them"
        remarks.append(f"keys and values are rounded to {grid} in the cache; {scales}{said}")
    if cache_of(source) and not grids:
        kinds = ", ".join(sorted({str(how.grid) for how in cache_of(source).values()}))
        remarks.append(
            f"the source rounds keys and values in its cache ({kinds}): not taken over, cache=… in the "
            "recipe says so"
        )
    return tuple(remarks)


def said_of_cache(source: Checkpoint) -> str | None:
    """The sentence about a file that rounds keys and values, or None."""
    grids = Counter(str(how) for how in cache_of(source).values())
    if not grids:
        return None
    listed = ", ".join(f"{n} scales of {kind}" for kind, n in grids.most_common())
    return f"keys and values are rounded on their way into the cache, as the file says: {listed}"


def same_cache(found: Mapping[str, Inputs], rows: Sequence[Row], fixed: Mapping[str, Tensor]) -> bool:
    """Whether a file says of its cache what a plan does, and holds the scales that are known here."""
    wanted = {row.name: row.cache for row in rows if row.cache is not None}
    if {name: how.grid for name, how in found.items()} != wanted:
        return False
    turned = {row.name for row in rows if row.cache is not None and row.turn}
    if turned != {name for name, how in found.items() if how.basis is not None}:
        return False
    return all(torch.equal(found[name].fixed["scale"], scale) for name, scale in fixed.items())


class CacheRange:
    """The largest key and the largest value of one attention, head by head.

    Args:
        turn: order of the Hadamard matrix that keys are multiplied by before they are rounded; 0 for none.
    """

    def __init__(self, turn: int = 0) -> None:
        self._turn = Hadamard.plain(turn) if turn else None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._lock = Lock()  # micro-batches come from several threads

    def see(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Look at keys and values ``n heads tokens channels``, and leave them as they are."""
        seen = keys if self._turn is None else self._turn.turn(keys)
        with self._lock:
            self._keys, self._values = _larger(self._keys, seen), _larger(self._values, values)
        return keys, values

    def scale(self, row: Row, dtype: str) -> Params:
        """What calibration fixes for the scale ``row``, as a file of this precision holds it.

        Raises:
            Unsolvable: nothing came by, or something that is no number.
        """
        largest = self._keys if row.name.endswith(KEYS) else self._values
        if row.cache is None or largest is None or not bool(torch.isfinite(largest).all()):
            raise Unsolvable("the range of its keys and values is not known", where=row.name)
        largest = largest if row.cache.extent == "head" else largest.max()
        scale = fixed_params(row.cache, -largest, largest, torch_dtype(dtype))["scale"]
        return {"scale": scale.reshape(row.shape).cpu()}


def _larger(known: Tensor | None, seen: Tensor) -> Tensor:
    largest = seen.detach().abs().amax((0, 2, 3)).float()
    return largest if known is None else torch.maximum(known, largest)


def _unable(container: Container, grid: InputGrid) -> str | None:
    if isinstance(container, InputContainer):
        return container.refuses_cache(grid)
    return "name one that does: > compressed-tensors, or > bitmill"


def _row(name: str, layer: int | None, grid: InputGrid, config: Mapping[str, Any], why: str) -> Row:
    heads = max(traits(config)["kv_heads"], 1)
    shape = (heads, 1, 1) if grid.extent == "head" else (1,) if grid.static else (0,)  # nothing is stored
    row = Row(name, ROLE, layer, shape, parse_grid("f32"), False, why)
    return replace(row, cache=grid)
