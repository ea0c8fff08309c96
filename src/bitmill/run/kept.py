"""What a model that runs keeps its keys and values in."""

from __future__ import annotations

from transformers import Cache, DynamicCache, PreTrainedConfig

from bitmill.run.cache import cache_of


def new_cache(kv: str, config: PreTrainedConfig, dtype: str) -> Cache:
    """An empty cache: transformers' own where keys and values are kept in what the model computes in, else a
    packed one.

    Args:
        kv: that type, or what :func:`~bitmill.run.cache.cache_of` takes: ``turboquant-3.5``, ``q4_0-rot`` …
        config: the model's own, once there is a model.
        dtype: what the model computes in.

    Raises:
        Refused: there is no such cache, or it does not go with the model.
    """
    return DynamicCache(config=config) if kv.strip().lower() == dtype else cache_of(kv, config)
