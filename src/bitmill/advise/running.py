"""What a cache that runs here ought to hold, to compare with what it does hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitmill.advise.cache_types import cache_types
from bitmill.advise.runtimes import RUNTIMES
from bitmill.advise.shape_config import config_shape
from bitmill.core.errors import BadFile, Refused


def cache_prediction(config: Mapping[str, Any], kv: str, tokens: int, *, packed: bool = False) -> int | None:
    """Bytes of the keys and values of one sequence, as transformers keeps them or, ``packed``, as
    :mod:`bitmill.run.cache` does.

    Args:
        config: the model's ``config.json``.
        kv: what they are stored as, see :func:`~bitmill.advise.cache_types.cache_types`.
        tokens: in the cache.

    Returns:
        None where nothing is known of such a cache, or of what the architecture keeps.
    """
    runtime = RUNTIMES["bitmill" if packed else "transformers"]
    try:
        kinds = cache_types(kv)
        blocks = config_shape(config, runtime.latent).blocks
    except (BadFile, Refused):
        return None
    return sum(
        runtime.cache_bytes(block, tokens, 1, kinds, False, (i, len(blocks))) + runtime.state_bytes(block, 1)
        for i, block in enumerate(blocks)
    )
