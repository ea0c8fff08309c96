"""Rounding of keys and values on their way into a cache, as the compressed-tensors package does it: keys
after their rotation by position, both before they are stored: attention sees what a cache gives back. Keys
that are rotated once more before that meet queries that are, too: the products are those of keys rounded in
that basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitmill.core.errors import Refused
from bitmill.core.types import Inputs
from bitmill.numerics.inputs import straight

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values ``n heads tokens channels`` as an attention makes them, to those that it is to see."""

KEYS, VALUES = "k_scale", "v_scale"
"""What the scale of one attention's keys, and of its values, is called."""


class _Passage:
    """Stands where an attention expects a cache, and hands on to the one that is there."""

    def __init__(self, change: Change, cache: Any) -> None:
        self._change, self._cache = change, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention is to see of all keys and values so far."""
        keys, values = self._change(keys, values)
        if self._cache is None:
            return keys, values
        seen: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return seen


def watch_cache(attention: nn.Module, change: Change) -> None:
    """Let the keys and values of transformers' ``attention`` go through ``change`` from now on."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": _Passage(change, kwargs.get("past_key_values"))}

    attention.register_forward_pre_hook(hook, with_kwargs=True)


def cache_changes(cache: Mapping[str, Inputs]) -> dict[str, Change]:
    """The rounding of each attention, by its path; ``cache`` is by the names of scales."""
    found: dict[str, dict[str, Inputs]] = {}
    for name, how in cache.items():
        attention, _, part = name.rpartition(".")
        found.setdefault(attention, {})[part] = how
    return {path: partial(_rounded, parts) for path, parts in found.items()}


def check_cache(model: nn.Module, cache: Mapping[str, Inputs], where: str) -> None:
    """Refuse to run a model that has no such attentions.

    Raises:
        Refused: a scale belongs to a module that is not there.
    """
    paths = {path for path, _ in model.named_modules()}
    for name in cache:
        if name.rpartition(".")[0] not in paths:
            raise Refused(
                f"keys or values are to be rounded by {name}, and no such attention is known here",
                where=where,
                fix="the weights alone: bitmill quantize MODEL hf-bf16 -o FOLDER, and measure that",
            )


def _rounded(parts: Mapping[str, Inputs], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    k, v = parts.get(KEYS), parts.get(VALUES)
    return (
        keys if k is None else straight(k, keys),
        values if v is None else straight(v, values),
    )
