"""What a model that runs keeps its keys and values in."""

from __future__ import annotations

from transformers import Cache, DynamicCache, PreTrainedConfig

from bitmill.core.errors import Refused


def new_cache(kv: str, config: PreTrainedConfig, dtype: str) -> Cache:
    """An empty cache.

    Args:
        kv: ``f32``, ``bf16`` or ``f16``, where the model computes in it.
        dtype: what the model computes in.

    Raises:
        Refused: there is no such cache.
    """
    if kv.strip().lower() == dtype:
        return DynamicCache(config=config)
    raise Refused(f"keys and values cannot be kept as {kv!r} here", fix=f"--kv {dtype}")
