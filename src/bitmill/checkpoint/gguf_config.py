"""A model's configuration as GGUF keys and back: the numbers llama.cpp needs, in Hugging Face's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_arch import Architecture
from bitmill.checkpoint.gguf_numbers import Numbers, short
from bitmill.checkpoint.gguf_rope import (
    YARN_BETAS,
    head_width,
    rope_keys,
    rope_of,
    rope_parameters,
    rotated,
    yarn_betas,
)
from bitmill.core.errors import BadFile, Refused

_GEMMA_PATTERN = {"gemma2": 2, "gemma3": 6}
"""Every which block attends to everything; llama.cpp knows it by the architecture."""
_GEMMA_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Blocks of the 27B models, whose attention scale is not that of their heads."""
_PATTERN = "attention.sliding_window_pattern"
_LOCAL, _FULL = "sliding_attention", "full_attention"


def config_of(file: GgufFile, arch: Architecture) -> dict[str, Any]:
    """What ``config.json`` would say about the model in ``file``.

    The dtype is the 16-bit one that matrices are stored in, float32 when they are quantized or wider.

    Raises:
        BadFile: a number the architecture needs is missing or impossible.
        Refused: it scales rotary positions in a way that is not known here.
    """
    keys = Numbers(file, arch.name)
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    embed = file.record("token_embd.weight")
    if embed.shape[-1] != hidden or len(embed.shape) != 2:
        raise BadFile(
            f"token_embd.weight has shape {embed.shape}, not (vocabulary, {hidden})", where=keys.where
        )
    head_dim, turned = _head_sizes(keys, arch, max(hidden // heads, 1))
    names, blocks = file.tensors, keys.whole("block_count")
    if blocks > len(names):
        raise BadFile(f"{blocks} blocks are announced, for {len(names)} tensors", where=keys.where)
    config: dict[str, Any] = {
        "architectures": [arch.causal],
        "model_type": arch.model_types[0],
        "vocab_size": embed.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.whole("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "rope_parameters": rope_of(keys, turned),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "dtype": _dtype(file),
    }
    if arch.experts:
        _experts(config, keys)
    elif arch.name == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in names
    for key, ours in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        config[ours] = _token_id(file, f"tokenizer.ggml.{key}_token_id", embed.shape[0])
    if arch.name.startswith("gemma"):
        _gemma(config, keys)
    else:
        config["hidden_act"] = "silu"
    if arch.name == "phi3":
        _phi3(config, keys, turned)
    if arch.name in ("llama", "qwen2", "qwen3", "qwen3moe"):
        _windows(config, keys)
    return config


def _head_sizes(keys: Numbers, arch: Architecture, usual: int) -> tuple[int, int]:
    """Width of a head, and how much of it is rotated."""
    if arch.partly_rotated:
        head_dim = keys.whole("attention.key_length", usual)
        turned = keys.whole("rope.dimension_count", head_dim)
    else:
        head_dim = turned = keys.whole("attention.key_length", keys.get("rope.dimension_count", usual))
    if head_dim % 2 or turned % 2 or turned > head_dim:
        raise BadFile(f"a head has the width {head_dim}, of which {turned} is rotated", where=keys.where)
    return head_dim, turned


def _token_id(file: GgufFile, key: str, vocabulary: int) -> int | None:
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocabulary:
        raise BadFile(
            f"key {key!r} is {short(value)}; the vocabulary has {vocabulary} tokens", where=str(file.path)
        )
    return value


def _dtype(file: GgufFile) -> str:
    kinds = [t.type.name for t in file.tensors.values() if len(t.shape) > 1]
    for kind, dtype in (("BF16", "bfloat16"), ("F16", "float16")):
        if kinds.count(kind) * 2 > len(kinds):
            return dtype
    return "float32"


def _gemma(config: dict[str, Any], keys: Numbers) -> None:
    name = keys.arch
    pattern = keys.whole(_PATTERN, _GEMMA_PATTERN[name])
    blocks, heads = config["num_hidden_layers"], config["num_attention_heads"]
    largest = blocks == _GEMMA_LARGEST[name]
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10_000.0)}
        ropes = {_FULL: config["rope_parameters"], _LOCAL: local}
        config.update(rope_parameters=ropes, attn_logit_softcapping=None)
    else:
        config["attn_logit_softcapping"] = keys.real("attn_logit_softcapping", 50.0)
    final = keys.get("final_logit_softcapping", None if name == "gemma3" else 30.0)
    config.update(
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=keys.whole("attention.sliding_window", 4096 if name == "gemma2" else None),
        layer_types=_layer_types(blocks, pattern),
        query_pre_attn_scalar=config["hidden_size"] // heads if largest else config["head_dim"],
        final_logit_softcapping=keys.real("final_logit_softcapping", final) if final else None,
    )


def _phi3(config: dict[str, Any], keys: Numbers, turned: int) -> None:
    rope = config["rope_parameters"]
    context = config["max_position_embeddings"]
    original = keys.whole("rope.scaling.original_context_length", context)
    rope["partial_rotary_factor"] = turned / config["head_dim"]
    config.update(original_max_position_embeddings=original, sliding_window=keys.window())
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]  # transformers' class has no such field


def _experts(config: dict[str, Any], keys: Numbers) -> None:
    count, used = keys.whole("expert_count"), keys.whole("expert_used_count")
    if used > count:
        raise BadFile(f"{used} of {count} experts are announced to be used", where=keys.where)
    config.update(num_local_experts=count, num_experts_per_tok=used)
    if keys.arch == "qwen3moe":
        config["moe_intermediate_size"] = keys.whole("expert_feed_forward_length")
        config.update(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    else:
        del config["attention_bias"]


def _windows(config: dict[str, Any], keys: Numbers) -> None:
    """Sliding windows of the models whose architecture in llama.cpp attends to everything."""
    window = keys.window()
    if window is None:
        return
    if config["model_type"] == "mixtral":
        config["sliding_window"] = window
        return
    if keys.arch == "llama":  # of the models it holds, Mistral is the one with a window
        config.update(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=window)
        del config["attention_bias"], config["mlp_bias"]
        return
    blocks = config["num_hidden_layers"]
    local = keys.get(_PATTERN, [1] * blocks)
    if not isinstance(local, list) or len(local) != blocks:
        raise BadFile(f"{keys.arch}.{_PATTERN} has no entry for each of {blocks} blocks", where=keys.where)
    kinds = [_LOCAL if flag else _FULL for flag in local]
    config.update(use_sliding_window=True, sliding_window=window, layer_types=kinds)


def _layer_types(blocks: int, pattern: int) -> list[str]:
    return [_LOCAL if (i + 1) % pattern else _FULL for i in range(blocks)]


def keys_of(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The architecture's keys for a model of this configuration.

    Raises:
        Refused: the model does something llama.cpp's architecture does not.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = head_width(config)
    if rope_parameters(config)["partial_rotary_factor"] != 1 and not arch.partly_rotated:
        raise Refused(f"llama.cpp's {arch.name} rotates whole heads; this model rotates a part of each")
    if rope_parameters(config)["rope_type"] == "longrope" and arch.name not in ("phi3", "llama"):
        raise Refused(f"llama.cpp's {arch.name} has no longrope scaling; this model has")
    keys: dict[str, Any] = {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": hidden,
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": int(config["vocab_size"]),
        **rope_keys(config),
    }
    if arch.name == "llama" or arch.partly_rotated:
        keys["rope.dimension_count"] = rotated(config)
    if arch.name in ("qwen3", "qwen3moe", "gemma2", "gemma3") or head_dim * heads != hidden:
        keys.update({"attention.key_length": head_dim, "attention.value_length": head_dim})
    if arch.name == "phi3":
        original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        keys.setdefault("rope.scaling.original_context_length", int(original))
    if arch.experts:
        keys.update(_expert_keys(config, arch.name))
    if arch.name.startswith("gemma"):
        keys.update(_gemma_keys(config, arch.name, head_dim))
    else:
        keys.update(_window_keys(config))
    return {f"{arch.name}.{key}": value for key, value in keys.items()}


def unheard(config: Mapping[str, Any], arch: Architecture) -> tuple[str, ...]:
    """What a plan says of numbers that a file holds and llama.cpp does not read from it."""
    said = []
    window = None if arch.name.startswith("gemma") else _window_keys(config).get("attention.sliding_window")
    if window is not None and window < int(config["max_position_embeddings"]):
        said.append(
            f"llama.cpp attends to the whole context of a {config['model_type']} model; "
            f"this one is made for a window of {window} tokens, and differs beyond it"
        )
    betas = yarn_betas(config)
    if betas != YARN_BETAS:
        said.append(
            "llama.cpp does not read YaRN's betas from a file: run it with "
            f"--yarn-beta-fast {betas[0]:g} --yarn-beta-slow {betas[1]:g}"
        )
    return tuple(said)


def _expert_keys(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    keys = {
        "expert_count": int(config.get("num_local_experts") or config["num_experts"]),
        "expert_used_count": int(config["num_experts_per_tok"]),
    }
    if name != "qwen3moe":
        return keys
    if not config.get("norm_topk_prob", False):
        raise Refused(
            "llama.cpp's qwen3moe makes the shares of chosen experts add up to one; this model does not"
        )
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise Refused("llama.cpp's qwen3moe has experts in every block; this model has some without")
    return {**keys, "expert_feed_forward_length": int(config["moe_intermediate_size"])}


def _window_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window")
    if not window or not config.get("use_sliding_window", "max_window_layers" not in config):
        return {}
    blocks = int(config["num_hidden_layers"])
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", 0))
        kinds = [_LOCAL if i >= first else _FULL for i in range(blocks)]
    if _LOCAL not in kinds:
        return {}
    keys: dict[str, Any] = {"attention.sliding_window": int(window)}
    if _FULL in kinds:
        keys[_PATTERN] = [int(kind == _LOCAL) for kind in kinds]
    return keys


def _gemma_keys(config: Mapping[str, Any], name: str, head_dim: int) -> dict[str, Any]:
    blocks = int(config["num_hidden_layers"])
    pattern = _GEMMA_PATTERN[name]
    kinds = config.get("layer_types") or _layer_types(blocks, config.get("sliding_window_pattern") or pattern)
    largest = blocks == _GEMMA_LARGEST[name]
    scale = config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
    if list(kinds) != _layer_types(blocks, pattern):
        raise Refused(
            f"llama.cpp's {name} has full attention in every block whose number divides by {pattern}; "
            "this model has it elsewhere"
        )
    if config.get("query_pre_attn_scalar", scale) != scale:
        raise Refused(f"llama.cpp's {name} scales attention by its head's width; this model does otherwise")
    on_scores, on_logits = (float(config.get(f"{x}_logit_softcapping") or 0) for x in ("attn", "final"))
    keys: dict[str, Any] = {"attention.sliding_window": int(config["sliding_window"])}
    if name == "gemma3":
        if on_scores:
            raise Refused("llama.cpp's gemma3 has no cap on attention; this model has")
        ropes = config.get("rope_parameters") or {}
        local = ropes.get(_LOCAL) or {}
        base = local.get("rope_theta", config.get("rope_local_base_freq", 10_000.0))
        keys["rope.freq_base_swa"] = float(base)
    elif not on_scores or not on_logits:
        raise Refused("llama.cpp's gemma2 caps attention and logits; this model does not")
    else:
        keys["attn_logit_softcapping"] = on_scores
    if on_logits:
        keys["final_logit_softcapping"] = on_logits
    return keys
