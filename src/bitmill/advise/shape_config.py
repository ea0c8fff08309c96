"""A model's shape from ``config.json``: transformers' own classes say what the file leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from bitmill.advise.shape import Kept, Shape
from bitmill.core.errors import BadFile, Refused

_MOST_BLOCKS = 4096
_LOCAL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of blocks with a window, and the number that says how wide."""
_FULL = {"full_attention", "attention", "indexed_attention", "global_attention"}
_RECURRENT = {"linear_attention", "mamba", "recurrent", "conv"}
_BOTH = {"hybrid"}
_WITHOUT = {"moe", "mlp"}
_ALL_RECURRENT = {"mamba", "mamba2", "falcon_mamba"}
_ALL_BOTH = {"falcon_h1"}


class _Numbers:
    """A configuration, whose numbers are believed only when they make sense."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts

    def get(self, *names: str) -> Any:
        """The first of these that says something."""
        return next((self.facts[name] for name in names if self.facts.get(name) is not None), None)

    def whole(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise BadFile(f"{names[0]} is {value!r:.60}; a number is needed", where="config.json")
        return value

    def of_block(self, i: int, *names: str, default: int | None = None) -> int:
        """A number that may differ from block to block."""
        value = self.get(*names)
        if isinstance(value, list):
            if i >= len(value):
                raise BadFile(f"{names[0]} has {len(value)} entries, none for block {i}", where="config.json")
            return _Numbers({names[0]: value[i]}).whole(names[0])
        return self.whole(*names, default=default)


def config_shape(config: Mapping[str, Any], latent: bool = True) -> Shape:
    """The shape of the model that ``config.json`` describes; of the text part where there are several.

    Args:
        latent: whether MLA blocks keep their latent, and not keys and values for every head.

    Raises:
        BadFile: a number is missing or impossible.
        Refused: a block of a kind whose memory is not known here.
    """
    inner = config.get("text_config")
    facts = dict(inner if isinstance(inner, dict) else config)
    c = _Numbers(facts)
    if not 0 < c.whole("num_hidden_layers", "n_layer", default=1) <= _MOST_BLOCKS:
        raise BadFile("num_hidden_layers is an impossible number", where="config.json")
    c = _Numbers(_settled(facts))
    blocks = c.whole("num_hidden_layers", "n_layer")
    hidden = c.whole("hidden_size", "n_embd")
    kinds = _kinds(c, blocks)
    owner = blocks - c.whole("num_kv_shared_layers", default=0)
    kept = tuple(_kept(c, kind, i, hidden, latent) if i < owner else Kept() for i, kind in enumerate(kinds))
    heads = c.of_block(0, "num_attention_heads", "n_head", "num_heads", default=1)
    nope = c.whole("qk_nope_head_dim", default=0) + c.whole("qk_rope_head_dim", default=0)
    middle = c.of_block(0, "intermediate_size", "n_inner", "d_ff", default=4 * hidden)
    used = c.whole("num_experts_per_tok", "moe_topk", default=0)
    routed = c.whole("moe_intermediate_size", "expert_ffn_hidden_size", default=middle)
    return Shape(
        name=str(c.get("model_type") or "unnamed"),
        blocks=kept,
        hidden=hidden,
        middle=max(used * routed, middle),
        queries=heads * (nope or c.whole("head_dim", default=hidden // max(heads, 1))),
        vocabulary=c.whole("vocab_size"),
        trained=c.whole("max_position_embeddings", "n_positions", default=0),
        experts=c.whole("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0),
        used=used,
    )


def _settled(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same facts, with transformers' defaults where it knows the type."""
    kind = facts.get("model_type")
    plain = {k: v for k, v in facts.items() if k not in ("quantization_config", "auto_map", "model_type")}
    try:
        known = AutoConfig.for_model(str(kind), **plain).to_dict()
    except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError):
        return facts  # the numbers themselves are checked where they are used
    return {**facts, **{k: v for k, v in known.items() if v is not None or k not in facts}}


def _kinds(c: _Numbers, blocks: int) -> list[str]:
    """What each block is, in transformers' words."""
    listed = c.get("layer_types", "layers_block_type", "block_types")
    model = str(c.get("model_type"))
    if isinstance(listed, list) and listed:
        return [str(listed[i % len(listed)]) for i in range(blocks)]
    if model in _ALL_RECURRENT or model in _ALL_BOTH:
        return ["hybrid" if model in _ALL_BOTH else "mamba"] * blocks
    if c.get("attn_layer_period") is not None:
        every, at = c.whole("attn_layer_period"), c.whole("attn_layer_offset", default=0)
        return ["attention" if i % max(every, 1) == at else "mamba" for i in range(blocks)]
    if c.get("attn_layer_indices") is not None:
        return ["attention" if i in c.get("attn_layer_indices") else "mamba" for i in range(blocks)]
    if model == "recurrent_gemma":
        raise Refused("what a recurrent_gemma model keeps between tokens is not known here")
    windowed = c.get("sliding_window") and c.get("use_sliding_window") is not False
    return ["sliding_attention" if windowed else "full_attention"] * blocks


def _kept(c: _Numbers, kind: str, i: int, hidden: int, latent: bool) -> Kept:
    if kind in _WITHOUT:
        return Kept()
    if kind in _RECURRENT:
        return Kept(states=_states(c, hidden))
    if kind not in _FULL and kind not in _LOCAL and kind not in _BOTH:
        raise Refused(
            f"what a block of kind {kind!r} keeps is not known here", where="config.json: layer_types"
        )
    window = c.whole(_LOCAL[kind], default=0) or None if kind in _LOCAL else None
    states = _states(c, hidden) if kind in _BOTH else ()
    heads = c.of_block(i, "num_attention_heads", "n_head")
    if c.get("kv_lora_rank") and c.get("qk_rope_head_dim"):
        return _latent(c, heads, latent, window)
    width = c.whole("attention_head_dim", "head_dim", "kv_channels", default=hidden // max(heads, 1))
    kv = c.of_block(i, "num_key_value_heads", "num_kv_heads", default=heads)
    if c.get("multi_query") is True:
        kv = 1
    if kind == "full_attention":
        width = c.whole("global_head_dim", default=width)
        kv = c.of_block(i, "num_global_key_value_heads", default=kv)
    value = c.whole("v_head_dim", default=width)
    return Kept(kv * width, kv * value, width, value, window, states)


def _latent(c: _Numbers, heads: int, latent: bool, window: int | None) -> Kept:
    """An MLA block: what its heads share, or what is made of it for each."""
    rank, roped = c.whole("kv_lora_rank"), c.whole("qk_rope_head_dim")
    indexer = c.whole("index_head_dim", default=0)
    if latent:
        return Kept(rank + roped + indexer, 0, rank + roped, 0, window)
    key, value = c.whole("qk_nope_head_dim") + roped, c.whole("v_head_dim")
    return Kept(heads * key + indexer, heads * value, key, value, window)


def _states(c: _Numbers, hidden: int) -> tuple[int, ...]:
    """Numbers of a recurrent block: what its convolution looks back at, and its state."""
    if c.get("linear_key_head_dim") is not None:
        wide, heads = c.whole("linear_key_head_dim"), c.whole("linear_num_key_heads")
        out, outs = c.whole("linear_value_head_dim"), c.whole("linear_num_value_heads")
        back = max(c.whole("linear_conv_kernel_dim") - 1, 0)
        return back * (2 * wide * heads + out * outs), wide * out * outs
    if c.get("conv_L_cache") is not None:
        return (hidden * max(c.whole("conv_L_cache") - 1, 0),)
    state = c.whole("mamba_d_state", "ssm_state_size", "state_size", default=0)
    if not state:
        raise Refused("what a recurrent block of this model keeps is not known here", where="config.json")
    back = max(c.whole("mamba_d_conv", "conv_kernel") - 1, 0)
    heads = c.whole("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads", default=0)
    width = c.whole("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim", default=0)
    expanded = c.whole("mamba_expand", "expand", default=2) * hidden
    if not heads or c.get("model_type") == "jamba":
        return back * expanded, state * expanded
    inner = c.whole("mamba_d_ssm", default=heads * width)
    groups = c.whole("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
    return back * (inner + 2 * groups * state), state * inner
