"""What a model that runs keeps its keys and values in: transformers' own cache, or a packed one."""

from __future__ import annotations

from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from bitmill.core.axes import Checkpoint, cache_of
from bitmill.core.cache_choice import cache_choice
from bitmill.core.cache_words import held_word
from bitmill.core.errors import Refused
from bitmill.run.attention import NAME, attend_packed
from bitmill.run.cache import PackedCache
from bitmill.run.cache import cache_of as packed_cache
from bitmill.run.held import held_bytes

_DENSE = "sdpa"
_NUMBERS = ("f32", "f16", "bf16")


def kept_as(kv: str | None, checkpoint: Checkpoint) -> tuple[str | None, bool]:
    """What a model's cache keeps its keys and values as, and whether that is the rounding which the file asks
    for, so that nothing else is to round them.

    Args:
        kv: what the user asks for; None is what the file says, where that can be held, or numbers.

    Raises:
        Refused: numbers that the file rounds would be rounded a second time, in another way.
    """
    said = cache_of(checkpoint)
    words = {None if how.basis is not None else held_word(how.grid) for how in said.values()}
    word = words.pop() if len(words) == 1 else None
    if kv is None:
        return word, word is not None
    asked = str(cache_choice(kv))
    if word is not None and asked == word:
        return word, True
    if said and asked not in _NUMBERS:
        grids = ", ".join(sorted({str(how) for how in said.values()}))
        raise Refused(
            f"the file rounds keys and values on their way into the cache ({grids}), and --kv {asked} would "
            "round them again",
            where=str(checkpoint.path),
            fix="leave --kv out, or --kv f16, which keeps what the file makes",
        )
    return kv, False


def is_packed(kv: str, dtype: str) -> bool:
    """Whether :func:`new_cache` makes a packed one: of all but what the model computes in."""
    return kv.strip().lower() != dtype


def new_cache(kv: str, config: PretrainedConfig, dtype: str) -> Cache:
    """An empty cache.

    Args:
        kv: what the model computes in is transformers' own cache; any other is a packed one, see
            :func:`~bitmill.run.cache.cache_of`.
        config: the model's own (``model.config``).
        dtype: what the model computes in.

    Raises:
        Refused: there is no such cache, or the model does not go with it.
    """
    return packed_cache(kv, config) if is_packed(kv, dtype) else DynamicCache(config=config)


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
