"""What a model that runs keeps its keys and values in: transformers' own cache, or a packed one."""

from __future__ import annotations

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from bitmill.run.attention import NAME, attend_packed
from bitmill.run.cache import PackedCache, cache_of
from bitmill.run.held import held_bytes

_DENSE = "sdpa"


def is_packed(kv: str, dtype: str) -> bool:
    """Whether :func:`new_cache` makes a packed one: of all but what the model computes in."""
    return kv.strip().lower() != dtype


def new_cache(kv: str, config: PreTrainedConfig, dtype: str) -> Cache:
    """An empty cache.

    Args:
        kv: what the model computes in is transformers' own cache; any other is a packed one, see
            :func:`~bitmill.run.cache.cache_of`.
        config: the model's own (``model.config``).
        dtype: what the model computes in.

    Raises:
        Refused: there is no such cache, or the model does not go with it.
    """
    return cache_of(kv, config) if is_packed(kv, dtype) else DynamicCache(config=config)


def attend(model: PreTrainedModel, cache: Cache) -> None:
    """Let the model read this cache as is best for it: a packed one in place."""
    in_place = model.config._attn_implementation == NAME
    if isinstance(cache, PackedCache) and not in_place:
        attend_packed(model)
    elif in_place and not isinstance(cache, PackedCache):
        model.set_attn_implementation(_DENSE)


def cache_bytes(cache: Cache) -> int:
    """Memory that the keys and values of a cache take, room for more included."""
    return cache.bytes_ if isinstance(cache, PackedCache) else held_bytes(cache)
