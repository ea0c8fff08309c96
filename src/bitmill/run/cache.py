"""Transformers' cache, holding packed keys and values: any method for either, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from bitmill.core.cache_choice import CacheChoice, cache_choice
from bitmill.core.caches import KEYS, VALUES, CacheMethod, stored_bytes
from bitmill.core.errors import Refused
from bitmill.run.attention import NAME, Stored
from bitmill.run.store import Store

PIECE = 1024
"""Tokens that are unpacked at a time."""


@final
class PackedLayer(CacheLayerMixin):
    """Keys and values of one attention.

    What attention sees is what is stored, from the first token on, so that a prompt in pieces gives what the
    whole prompt does. With the attention of :mod:`bitmill.run.attention` it is read in place; any other is
    handed all of this one layer's keys and values, unpacked.

    Attributes:
        k, v: what is stored.
        sliding_window: tokens that the attention looks back over, itself included; None for all.
        is_sliding: whether there is such a window.
        record_past: whether nothing is let go until the next :meth:`crop`.
    """

    is_croppable = True

    def __init__(
        self,
        methods: tuple[CacheMethod, CacheMethod],
        window: int | None,
        sliding: int | None,
        config: PretrainedConfig,
    ) -> None:
        super().__init__()
        self._methods, self._window, self._config = methods, window, config
        self.sliding_window, self.is_sliding = sliding, sliding is not None
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Empty."""
        keys, values = self._methods
        self.k = Store(keys, KEYS, self._window, self.sliding_window)
        self.v = Store(values, VALUES, self._window, self.sliding_window)
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is needed before the first token."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store ``batch heads tokens head`` of both; what attention is to see of all so far."""
        self.is_initialized = True
        seen, _ = self.get_mask_sizes(key_states.shape[-2])
        self.k.append(key_states)
        self.v.append(value_states)
        if self._config._attn_implementation == NAME:
            return (
                Stored(self.k, seen, key_states, PIECE, self._settle),
                Stored(self.v, seen, value_states, PIECE, self._settle),
            )
        keys = self.k.dense(self.k.kept - seen, PIECE).to(key_states.dtype)
        values = self.v.dense(self.v.kept - seen, PIECE).to(value_states.dtype)
        self._settle()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens so far, those out of sight included."""
        return self.k.tokens

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that attention will see once ``query_length`` more are here, and the place of the first."""
        before = self.k.tokens
        if self.sliding_window is None:
            return before + query_length, 0
        seen = min(before, self.sliding_window - 1)
        return seen + query_length, before - seen

    def activate_past_recording(self) -> None:
        """Let nothing go, so that :meth:`crop` can go back past a window."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest ``-tokens_to_remove`` tokens.

        Raises:
            Refused: a window has let go what would come back into sight.
        """
        if tokens_to_remove > 0:
            raise Refused(
                f"a cache is not cropped to {tokens_to_remove} tokens",
                fix=f"a number below zero takes back as many: crop({-tokens_to_remove})",
            )
        back = min(-tokens_to_remove, self.k.tokens)
        if self.sliding_window is not None:
            needed = min(self.k.tokens - back, self.sliding_window - 1)
            if min(self.k.kept, self.v.kept) - back < needed:
                raise Refused(
                    f"{back} tokens cannot be taken back: a window of {self.sliding_window} has let go "
                    "what came before them",
                    fix="activate_past_recording() before they are stored",
                )
        self.k.crop(back)
        self.v.crop(back)
        self.k.forget()
        self.v.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences ``beam_idx``, in this order."""
        self._move(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        self._move(lambda held: held.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences."""
        self._move(lambda held: held[indices.to(held.device)])

    def predicted(self, window: int | None, tokens: int, sequences: int) -> int:
        """Bytes after ``tokens`` of each of ``sequences``, with heads as they are here."""
        found = 0
        for store in (self.k, self.v):
            heads, head = store.heads
            sizes = (heads, head, tokens, window, self.sliding_window, sequences)
            found += stored_bytes(store.method, store.part, *sizes)
        return found

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        self.k.move(change)
        self.v.move(change)

    def _settle(self) -> None:
        if not self.record_past:
            self.k.forget()
            self.v.forget()


@final
class PackedCache(Cache):
    """A model's cache; see :func:`cache_of`.

    Attributes:
        choice: what it stores, and how.
    """

    def __init__(self, choice: CacheChoice, config: PretrainedConfig) -> None:
        self.choice = choice
        decoder = config.get_text_config(decoder=True)
        super().__init__(layers=_layers(choice, decoder))

    @property
    def packed(self) -> list[PackedLayer]:
        """The layers that have keys and values, in order."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def bytes_(self) -> int:
        """Memory that keys and values take, room for more included: what :meth:`predicted` says."""
        return sum(layer.k.bytes_ + layer.v.bytes_ for layer in self.packed)

    def predicted(self, tokens: int, sequences: int = 1) -> int:
        """Bytes that ``tokens`` of each of ``sequences`` take, to the byte.

        Raises:
            Refused: nothing has been stored yet, so that heads have no size.
        """
        found = self.packed
        if not found or not found[0].k.tokens:
            raise Refused("an empty cache does not know its heads", fix="bitmill memory MODEL --kv METHOD")
        return sum(layer.predicted(self.choice.window, tokens, sequences) for layer in found)


def cache_of(text: str, config: PretrainedConfig) -> PackedCache:
    """An empty cache for a model with this configuration.

    Args:
        text: what stores keys and values: ``turboquant-3.5``, ``kivi-2``, ``q4_0-rot``,
            ``k=q8_0,v=turboquant-3,ends=2``; see :func:`~bitmill.core.cache_choice.cache_choice`.
        config: the model's own (``model.config``), so that its attention is known.

    Raises:
        Refused: the text does not parse, the heads do not go with it, or a layer keeps something else.
    """
    return PackedCache(cache_choice(text), config)


def _layers(choice: CacheChoice, config: PretrainedConfig) -> list[Any]:
    usual = DynamicCache(config=config).layers
    count = config.num_hidden_layers
    layers: list[Any] = []
    for index, layer in enumerate(usual):
        kind = type(layer)
        if kind in (DummyLayer, LinearAttentionLayer):
            layers.append(layer)
            continue
        if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Refused(
                f"layer {index} keeps more than keys and values ({kind.__name__}), which is not packed here",
                fix="run the model without --kv",
            )
        sliding = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        layers.append(PackedLayer(choice.of(index, count), choice.window, sliding, config))
    head = config.head_dim if "head_dim" in config.to_dict() else None
    head = head or config.hidden_size // config.num_attention_heads
    choice.check(len(layers), head, head)
    return layers
