"""A model's shape from GGUF keys, read as llama.cpp reads them: what its caches are made of, block by block.

Some of it no key says: which blocks have a window is the architecture's for half of the families, and is a
table here. Facts of llama.cpp as of September 2026.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from bitmill.advise.shape import Kept, Shape
from bitmill.core.errors import BadFile, Refused

_MOST_BLOCKS = 4096
_LARGEST = 1 << 31


@dataclass(frozen=True)
class _Windowed:
    """How an architecture divides its blocks into those with a window and those without.

    Attributes:
        every: one block of so many sees everything; 0: the file must list them.
        first: it is the first of them, not the last.
        usual: the window where no key gives one; 0: no window then.
        fixed: the window whatever the key says; a key of 0 still switches it off.
        blocks: only models of this many blocks have windows.
    """

    every: int = 0
    first: bool = False
    usual: int = 0
    fixed: int = 0
    blocks: int = 0


_WINDOWS: Mapping[str, _Windowed] = MappingProxyType(
    {
        "afmoe": _Windowed(4),
        "cohere2": _Windowed(4),
        "cohere2moe": _Windowed(4, first=True),
        "exaone-moe": _Windowed(4, usual=128),
        "exaone4": _Windowed(4, usual=4096, blocks=64),
        "gemma2": _Windowed(2, usual=4096),
        "gemma3": _Windowed(6),
        "gemma3n": _Windowed(5),
        "gemma4": _Windowed(),
        "gpt-oss": _Windowed(2),
        "granite_swa": _Windowed(),
        "laguna": _Windowed(4, first=True),
        "llama4": _Windowed(4, usual=8192, fixed=8192),
        "maple": _Windowed(),
        "mellum": _Windowed(4),
        "mimo2": _Windowed(),
        "muse-glimmer": _Windowed(4),
        "olmo2": _Windowed(4),
        "plamo3": _Windowed(8),
        "smallthinker": _Windowed(4, first=True, fixed=4096),
        "spark2_5": _Windowed(),
        "step35": _Windowed(),
    }
)
"""Architectures with windows; a window in the keys of any other (llama, qwen2, phi3) is not heeded."""
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_BY_HEADS = frozenset(
    {
        "jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe",
        "nemotron_h", "nemotron_h_moe", "kimi-linear", "bailingmoe3",
    }
)  # fmt: skip
"""A block of these without key heads is a recurrent one."""
_DELTA = frozenset({"kimi-linear", "bailingmoe3"})
"""Of these, the recurrent blocks keep a square matrix a head."""
_BY_INTERVAL: Mapping[str, int] = MappingProxyType({"qwen3next": 4, "qwen35": 4, "qwen35moe": 4})
"""One block of so many attends, the others are recurrent, unless the file lists them."""
_INDEXED = frozenset({"deepseek32", "glm-dsa"})
"""Architectures that keep an indexer's key beside the latent."""
_LISTED_CONTEXT = 1 << 20
"""From this trained context on, glm-dsa has an indexer in some blocks only."""
_KEEP_NOTHING = frozenset(
    {
        "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe",
        "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1",
    }
)  # fmt: skip
"""Architectures that read all tokens at once."""
_NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        "deepseek4": "compressed caches of several kinds",
        "dflash": "it drafts for another model",
        "dots3note": "an indexer beside windows of latents",
        "eagle3": "it drafts for another model",
        "gemma4-assistant": "it reads another model's cache",
        "glm5-next": "an indexer beside recurrent blocks",
        "hy_v4": "an indexer in some of its blocks",
        "kimi-k3": "latents beside recurrent blocks of its own kind",
        "minimax-01": "linear attention of its own kind",
        "minimax-m3": "an indexer a group of heads",
        "nanbeige": "blocks that are run more than once",
        "qwen4exp": "an indexer beside recurrent blocks",
        "t5": "caches of an encoder",
    }
)


class _Keys:
    """Keys of one architecture, believed only when they make sense."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise BadFile("key 'general.architecture' is missing", where=where)
        self.arch = name

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.arch}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        return self._number(key, value)

    def each(self, key: str, blocks: int, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """One number a block; a single number is every block's."""
        value = self.get(key)
        if value is None and default is not None:
            return tuple(default)
        if not isinstance(value, list):
            return (self._number(key, value),) * blocks
        if len(value) < blocks:
            raise BadFile(
                f"key '{self.arch}.{key}' has {len(value)} entries for {blocks} blocks", where=self.where
            )
        return tuple(self._number(key, int(v) if isinstance(v, bool) else v) for v in value[:blocks])

    def _number(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST:
            raise BadFile(f"key '{self.arch}.{key}' is {value!r:.60}; a number is needed", where=self.where)
        return value


def gguf_shape(metadata: Mapping[str, Any], where: str, vocabulary: int | None = None) -> Shape:
    """The shape of the model that these keys describe.

    Args:
        where: the file, for messages.
        vocabulary: rows of the embedding, where the keys do not say.

    Raises:
        BadFile: a number is missing or impossible.
        Refused: llama.cpp keeps something for this architecture that is not known here.
    """
    keys = _Keys(metadata, where)
    if keys.arch in _NOT_HERE:
        raise Refused(
            f"what a {keys.arch} model keeps between tokens is not known here: {_NOT_HERE[keys.arch]}",
            where=where,
            fix="llama-fit-params measures it, with the file and a GPU at hand",
        )
    blocks = keys.whole("block_count")
    if not 0 < blocks <= _MOST_BLOCKS:
        raise BadFile(f"{blocks} blocks are announced", where=where)
    hidden = keys.whole("embedding_length")
    heads = keys.each("attention.head_count", blocks, [0] * blocks)
    width = hidden // heads[0] if heads[0] else 0
    queries = max(heads) * keys.whole("attention.key_length", width)
    tokens = metadata.get("tokenizer.ggml.tokens")
    known = len(tokens) if isinstance(tokens, list) else None
    return Shape(
        name=keys.arch,
        blocks=_kept(keys, blocks, heads, hidden),
        hidden=hidden,
        middle=_middle(keys, blocks),
        queries=queries,
        vocabulary=known or keys.whole("vocab_size", vocabulary or 0),
        trained=keys.whole("context_length", 0),
        experts=keys.whole("expert_count", 0),
        used=max(keys.each("expert_used_count", blocks, [0])),
    )


def _middle(keys: _Keys, blocks: int) -> int:
    dense = max(keys.each("feed_forward_length", blocks, [0]))
    if not keys.get("expert_count"):
        return dense
    used = max(keys.each("expert_used_count", blocks, [1]))
    return max(dense, used * max(keys.each("expert_feed_forward_length", blocks, [dense])))


def _kept(keys: _Keys, blocks: int, heads: Sequence[int], hidden: int) -> tuple[Kept, ...]:
    """Each block's cache. Blocks that only predict further ahead (NextN) are not run, and keep nothing."""
    ahead = keys.whole("nextn_predict_layers", 0)
    if ahead > blocks:
        raise BadFile(f"{ahead} of {blocks} blocks are said to predict further ahead", where=keys.where)
    run = 0 if keys.arch in _KEEP_NOTHING else blocks - ahead
    kv = keys.each("attention.head_count_kv", blocks, heads)
    window, local = _windows(keys, blocks)
    recurrent = _recurrent(keys, blocks, kv)
    owner = _shared_from(keys, blocks)
    states = _states(keys, hidden, max(heads)) if any(recurrent) else ()
    everywhere = keys.arch == "falcon-h1"
    kept = []
    for i in range(blocks):
        if i >= run or i >= owner:
            kept.append(Kept())
            continue
        attends = not recurrent[i] or everywhere
        block = _attention(keys, i, hidden, heads, kv[i], local[i], window) if attends else Kept()
        kept.append(replace(block, states=states) if recurrent[i] else block)
    return tuple(kept)


def _attention(
    keys: _Keys, i: int, hidden: int, heads: Sequence[int], kv: int, local: bool, window: int | None
) -> Kept:
    """Keys and values of block ``i``, or its latent."""
    usual = hidden // heads[0] if heads[0] else 0
    key, value = keys.whole("attention.key_length", usual), keys.whole("attention.value_length", usual)
    if local:
        key = keys.whole("attention.key_length_swa", key)
        value = keys.whole("attention.value_length_swa", value)
    reach = window if local else None
    if keys.get("attention.key_length_mla") and keys.get("attention.value_length_mla"):
        return Kept(key * kv + (_indexer(keys, i) if keys.arch in _INDEXED else 0), 0, key, 0, reach)
    return Kept(key * kv, value * kv, key, value, reach)


def _indexer(keys: _Keys, i: int) -> int:
    """Numbers a token that the indexer of block ``i`` keeps."""
    width = keys.whole("attention.indexer.key_length", 0)
    if keys.arch == "glm-dsa" and keys.get("attention.indexer.types") is not None:
        return width if keys.each("attention.indexer.types", keys.whole("block_count"))[i] else 0
    if keys.arch == "glm-dsa" and keys.whole("context_length", 0) >= _LISTED_CONTEXT:
        raise Refused("the file does not say which of its blocks have an indexer", where=keys.where)
    return width


def _windows(keys: _Keys, blocks: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which blocks have it."""
    everywhere = (False,) * blocks
    if keys.arch in ("lfm2", "lfm2moe") and keys.get("attention.sliding_window"):
        return keys.whole("attention.sliding_window"), (True,) * blocks
    rule = _WINDOWS.get(keys.arch)
    if rule is None or (rule.blocks and blocks != rule.blocks):
        return None, everywhere
    window = keys.whole("attention.sliding_window", rule.usual)
    if not window:
        return None, everywhere
    listed = keys.get("attention.sliding_window_pattern")
    if isinstance(listed, list):
        return rule.fixed or window, tuple(
            bool(v) for v in keys.each("attention.sliding_window_pattern", blocks)
        )
    every = keys.whole("attention.sliding_window_pattern", rule.every)
    whole = 0 if rule.first else every - 1
    return rule.fixed or window, tuple(not every or i % every != whole for i in range(blocks))


def _recurrent(keys: _Keys, blocks: int, kv: Sequence[int]) -> tuple[bool, ...]:
    """Which blocks keep a state instead of, or beside, keys and values."""
    if keys.arch in _RECURRENT or keys.arch == "falcon-h1":
        return (True,) * blocks
    if keys.arch in _BY_HEADS:
        dense = keys.each("feed_forward_length", blocks, [0] * blocks)
        only = keys.arch.startswith("nemotron")
        return tuple(not heads and not (only and dense[i]) for i, heads in enumerate(kv))
    if keys.arch in _BY_INTERVAL:
        interval = keys.whole("full_attention_interval", _BY_INTERVAL[keys.arch])
        listed = keys.get("attention.recurrent_layers")
        if listed is not None:
            return tuple(bool(v) for v in keys.each("attention.recurrent_layers", blocks))
        return tuple(bool((i + 1) % max(interval, 1)) for i in range(blocks))
    return (False,) * blocks


def _shared_from(keys: _Keys, blocks: int) -> int:
    """The first block that reads another's keys and values instead of keeping its own."""
    if keys.arch == "gemma3n":
        return 20
    return blocks - keys.whole("attention.shared_kv_layers", 0) if keys.arch == "gemma4" else blocks


def _states(keys: _Keys, hidden: int, heads: int) -> tuple[int, ...]:
    """Numbers of a recurrent block's two tensors: what its convolution looks back at, and its state."""
    if keys.arch.startswith(("rwkv", "arwkv")):
        return keys.whole("token_shift_count", 2) * hidden, hidden * keys.whole("wkv.head_size")
    if keys.arch.startswith("lfm2"):
        return (hidden * max(keys.whole("shortconv.l_cache") - 1, 0),)
    kernel = keys.whole("ssm.conv_kernel")
    if keys.arch in _DELTA:
        wide = keys.whole("kda.head_dim")
        return 3 * (kernel - 1 if kernel else 3) * heads * wide, wide * wide * heads
    inner, state = keys.whole("ssm.inner_size"), keys.whole("ssm.state_size")
    groups = 0 if keys.arch in ("mamba", "jamba") else keys.whole("ssm.group_count")
    return max(kernel - 1, 0) * (inner + 2 * groups * state), state * inner
