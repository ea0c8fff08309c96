"""A model's configuration as GGUF keys and back: the numbers llama.cpp needs, in Hugging Face's words.

Rotary frequencies follow "Llama 3" scaling (Meta, 2024): wavelengths beyond the original context are
stretched by a factor, short ones kept, those between blended. llama.cpp stores the outcome as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_arch import Architecture
from bitmill.core.errors import BadFile, Refused

_GEMMA_PATTERN = 6
_GEMMA_LARGEST = 62  # blocks of Gemma 3 27B, whose attention scale is not that of its heads
_YARN = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "attention_factor": "rope.scaling.attn_factor",
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class _Keys:
    """Reads required numbers of one architecture and checks that they make sense."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def whole(self, key: str, default: Any = None) -> int:
        value = self._one(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self._bad(key, value)
        return value

    def real(self, key: str, default: Any = None) -> float:
        value = self._one(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self._bad(key, value)
        return shortest(value)

    def _one(self, key: str, default: Any) -> Any:
        """The value; one number a block counts as one number when all are equal."""
        value = self.get(key, default)
        return value[0] if isinstance(value, list) and len(set(value)) == 1 else value

    def _bad(self, key: str, value: Any) -> BadFile:
        full = f"{self.arch}.{key}"
        return BadFile(
            f"key {full!r} is {_short(value)}; a positive number is needed", where=str(self.file.path)
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "…"


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def config_of(file: GgufFile, arch: Architecture) -> dict[str, Any]:
    """What ``config.json`` would say about the model in ``file``.

    The dtype is the 16-bit one that matrices are stored in, float32 when they are quantized or wider.

    Raises:
        BadFile: a number the architecture needs is missing or impossible.
        Refused: it scales rotary positions in a way that is not known here.
    """
    keys = _Keys(file, arch.name)
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    embed = file.record("token_embd.weight")
    if embed.shape[-1] != hidden or len(embed.shape) != 2:
        raise BadFile(
            f"token_embd.weight has shape {embed.shape}, not (vocabulary, {hidden})", where=str(file.path)
        )
    head_dim = keys.whole("attention.key_length", keys.get("rope.dimension_count", max(hidden // heads, 1)))
    if head_dim % 2:
        raise BadFile(f"a head has the odd width {head_dim}", where=str(file.path))
    names, blocks = file.tensors, keys.whole("block_count")
    if blocks > len(names):
        raise BadFile(f"{blocks} blocks are announced, for {len(names)} tensors", where=str(file.path))
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
        "rope_parameters": _rope(file, keys, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "dtype": _dtype(file),
    }
    if arch.name == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in names
    for key, ours in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        config[ours] = _token_id(file, f"tokenizer.ggml.{key}_token_id", embed.shape[0])
    if arch.name == "gemma3":
        _gemma3(config, keys)
    else:
        config["hidden_act"] = "silu"
    return config


def _token_id(file: GgufFile, key: str, vocabulary: int) -> int | None:
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocabulary:
        raise BadFile(
            f"key {key!r} is {_short(value)}; the vocabulary has {vocabulary} tokens", where=str(file.path)
        )
    return value


def _dtype(file: GgufFile) -> str:
    kinds = [t.type.name for t in file.tensors.values() if len(t.shape) > 1]
    for kind, dtype in (("BF16", "bfloat16"), ("F16", "float16")):
        if kinds.count(kind) * 2 > len(kinds):
            return dtype
    return "float32"


def _gemma3(config: dict[str, Any], keys: _Keys) -> None:
    pattern = keys.whole("attention.sliding_window_pattern", _GEMMA_PATTERN)
    blocks, heads = config["num_hidden_layers"], config["num_attention_heads"]
    full = config["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10_000.0)}
    scale = config["hidden_size"] // heads if blocks == _GEMMA_LARGEST else config["head_dim"]
    config.update(
        hidden_activation="gelu_pytorch_tanh",
        rope_parameters={"full_attention": full, "sliding_attention": local},
        sliding_window=keys.whole("attention.sliding_window"),
        layer_types=_layer_types(blocks, pattern),
        query_pre_attn_scalar=scale,
        attn_logit_softcapping=None,
        final_logit_softcapping=keys.real("final_logit_softcapping")
        if keys.get("final_logit_softcapping")
        else None,
    )


def _layer_types(blocks: int, pattern: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(blocks)]


def _rope(file: GgufFile, keys: _Keys, head_dim: int) -> dict[str, Any]:
    theta = keys.real("rope.freq_base", 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = keys.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope.update(rope_type=kind, factor=keys.real("rope.scaling.factor"))
        if kind == "yarn":
            original = keys.whole("rope.scaling.original_context_length")
            rope["original_max_position_embeddings"] = original
            rope.update({k: keys.real(v) for k, v in _YARN.items() if keys.get(v) is not None})
    elif kind != "none":
        raise Refused(f"rope scaling {_short(kind)} cannot be read", where=str(file.path))
    if "rope_freqs.weight" in file.tensors:
        rope.update(_llama3_of(file.dense("rope_freqs.weight"), theta, head_dim, str(file.path)))
    return rope


def _llama3_of(divisors: Tensor, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """The parameters whose divisors these are: Meta's, with the factor the tensor shows."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if divisors.shape != (head_dim // 2,) or not torch.allclose(
        llama3_divisors(rope, head_dim), divisors, rtol=1e-4
    ):
        raise Refused(
            "rope_freqs.weight holds frequencies that are not those of Llama 3",
            where=where,
            fix="start from the safetensors model, whose config.json says how positions are scaled",
        )
    return rope


def llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """What every rotary frequency is divided by, ``head_dim / 2`` float32."""
    factor, low, high, original = (float(rope[name]) for name in _LLAMA3)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - blend) / factor + blend)


def keys_of(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The architecture's keys for a model of this configuration.

    Raises:
        Refused: the model does something llama.cpp's architecture does not.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    rope = _rope_parameters(config)
    keys: dict[str, Any] = {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": hidden,
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": int(config["vocab_size"]),
    }
    if arch.name == "llama":
        keys["rope.dimension_count"] = head_dim
    if arch.name in ("qwen3", "gemma3") or head_dim * heads != hidden:
        keys.update({"attention.key_length": head_dim, "attention.value_length": head_dim})
    keys.update(_scaling_keys(rope))
    if arch.name == "gemma3":
        keys.update(_gemma3_keys(config, head_dim))
    return {f"{arch.name}.{key}": value for key, value in keys.items()}


def rope_tensor(config: Mapping[str, Any]) -> Tensor | None:
    """The tensor ``rope_freqs.weight`` of a model with Llama 3 scaling, else None."""
    rope = _rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return llama3_divisors(rope, int(head_dim))


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one shape, whichever of Hugging Face's two spellings the model uses."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in rope:
        rope = dict(rope["full_attention"])
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    return rope


def _scaling_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise Refused(
            f"rope scaling {kind!r} cannot be written as GGUF",
            fix="GGUF works with default, linear, yarn and llama3 scaling",
        )
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        keys.update({v: float(rope[k]) for k, v in _YARN.items() if rope.get(k) is not None})
    return keys


def _gemma3_keys(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    blocks = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or _layer_types(
        blocks, config.get("sliding_window_pattern") or _GEMMA_PATTERN
    )
    largest = blocks == _GEMMA_LARGEST
    scale = config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
    if list(kinds) != _layer_types(blocks, _GEMMA_PATTERN):
        raise Refused(
            "llama.cpp's gemma3 has full attention in every sixth block; this model has it elsewhere"
        )
    if config.get("query_pre_attn_scalar", scale) != scale or config.get("attn_logit_softcapping"):
        raise Refused("llama.cpp's gemma3 scales attention by its head's width; this model does otherwise")
    ropes = config.get("rope_parameters") or {}
    local = (ropes.get("sliding_attention") or {}).get(
        "rope_theta", config.get("rope_local_base_freq", 10_000.0)
    )
    keys = {
        "attention.sliding_window": int(config["sliding_window"]),
        "rope.freq_base_swa": float(local),
    }
    if config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return keys
