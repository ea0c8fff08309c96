"""How positions are rotated, as GGUF keys and tensors and back, in Hugging Face's words.

"Llama 3" scaling (Meta, 2024): wavelengths beyond the original context are stretched by a factor, short ones
kept, those between blended; llama.cpp stores the outcome as a tensor. YaRN (arXiv:2309.00071) and linear
scaling are keys. LongRoPE (arXiv:2402.13753) has a divisor for every frequency, one set for short contexts
and one for long ones, as two tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.gguf_numbers import Numbers, short, shortest
from bitmill.core.errors import BadFile, Refused

ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that llama.cpp derives from the configuration: no Hugging Face name, carried along as they are."""

YARN_BETAS = (32.0, 1.0)
"""Where YaRN's ramp ends and starts, in turns over the original context, unless a model says otherwise."""

_YARN_BETAS = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ELSEWHERE = "start from the safetensors model, whose config.json says how positions are scaled"


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one shape, whichever of Hugging Face's spellings the model uses."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in rope:
        rope = dict(rope["full_attention"])
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if "long_factor" in rope:  # called su and yarn before it was called longrope
        rope["rope_type"] = "longrope"
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if rope["rope_type"] in ("yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", original)
    return rope


def head_width(config: Mapping[str, Any]) -> int:
    """Values of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotated(config: Mapping[str, Any]) -> int:
    """How many values of a head are rotated."""
    return int(head_width(config) * rope_parameters(config)["partial_rotary_factor"])


def yarn_betas(config: Mapping[str, Any]) -> tuple[float, float]:
    """A model's own :data:`YARN_BETAS`; the usual ones for a model without YaRN."""
    rope = rope_parameters(config)
    own = rope if rope["rope_type"] == "yarn" else {}
    fast, slow = (float(own.get(k) or usual) for k, usual in zip(_YARN_BETAS, YARN_BETAS, strict=True))
    return fast, slow


def rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys ``rope.*`` of a model, without the architecture's prefix.

    Raises:
        Refused: a scaling that llama.cpp does not have.
    """
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("default", "llama3"):
        return keys
    if kind not in ("linear", "yarn", "longrope") or rope.get("truncate") is False:
        raise Refused(
            f"rope scaling {kind!r}{' without truncation' * (kind == 'yarn')} cannot be written as GGUF",
            fix="GGUF works with default, linear, yarn, longrope and llama3 scaling",
        )
    keys["rope.scaling.type"] = kind
    if kind == "linear":
        return {**keys, "rope.scaling.factor": float(rope["factor"])}
    keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    if kind == "longrope":
        return {**keys, "rope.scaling.attn_factor": _longrope_attention(rope, config)}
    keys["rope.scaling.factor"] = float(rope["factor"])
    keys.update({v: float(rope[k]) for k, v in _YARN_BETAS.items() if rope.get(k) is not None})
    attention = _yarn_attention(rope)
    if attention is not None:  # llama.cpp multiplies it onto YaRN's own
        keys["rope.scaling.attn_factor"] = attention / _magnitude(float(rope["factor"]))
    return keys


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of :data:`ROPE_TENSORS` that this model's rotation needs, by llama.cpp's name.

    Raises:
        Refused: divisors that do not fit the heads.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_divisors(rope, rotated(config))}
    if rope["rope_type"] != "longrope":
        return {}
    found = {}
    for length in ("long", "short"):
        values = torch.tensor(rope.get(f"{length}_factor") or (), dtype=torch.float32)
        if values.shape != (rotated(config) // 2,):
            raise Refused(
                f"{length}_factor has {len(values)} numbers; {rotated(config) // 2} frequencies are rotated",
                where="config.json: rope_parameters",
            )
        found[f"rope_factors_{length}.weight"] = values
    return found


def rope_of(numbers: Numbers, dimensions: int) -> dict[str, Any]:
    """What ``rope_parameters`` would say about the model in a file.

    Args:
        numbers: its keys.
        dimensions: of a head that are rotated.

    Raises:
        BadFile: keys or tensors that do not fit together.
        Refused: a scaling that is not known here.
    """
    theta = numbers.real("rope.freq_base", 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = numbers.get("rope.scaling.type", "none")
    tensors = numbers.file.tensors
    if "rope_factors_long.weight" in tensors or "rope_factors_short.weight" in tensors:
        return {**rope, **_longrope_of(numbers, dimensions)}
    if kind in ("linear", "yarn"):
        rope.update(rope_type=kind, factor=numbers.real("rope.scaling.factor"))
        if kind == "yarn":
            rope["original_max_position_embeddings"] = numbers.whole("rope.scaling.original_context_length")
            rope.update({k: numbers.real(v) for k, v in _YARN_BETAS.items() if numbers.get(v) is not None})
            if numbers.get("rope.scaling.attn_factor") is not None:
                own = _magnitude(rope["factor"])
                rope["attention_factor"] = shortest(numbers.real("rope.scaling.attn_factor") * own)
    elif kind != "none":
        raise Refused(f"rope scaling {short(kind)} cannot be read", where=numbers.where)
    if "rope_freqs.weight" in tensors:
        rope.update(_llama3_of(numbers.file.dense("rope_freqs.weight"), theta, dimensions, numbers.where))
    return rope


def _longrope_of(numbers: Numbers, dimensions: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "longrope"}
    for length in ("long", "short"):
        values = numbers.file.dense(f"rope_factors_{length}.weight").to(torch.float32)
        if values.shape != (dimensions // 2,):
            raise BadFile(
                f"rope_factors_{length}.weight has shape {tuple(values.shape)}, not ({dimensions // 2},)",
                where=numbers.where,
            )
        rope[f"{length}_factor"] = [shortest(value) for value in values.tolist()]
    context = numbers.whole("context_length")
    rope["original_max_position_embeddings"] = numbers.whole("rope.scaling.original_context_length", context)
    stored = numbers.real("rope.scaling.attn_factor", 1.0)
    usual = _longrope_attention(rope, {"max_position_embeddings": context})
    return rope if shortest(usual) == stored else {**rope, "attention_factor": stored}


def _longrope_attention(rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """What the rotated values are multiplied by, so that attention keeps its entropy in a longer context."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = int(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or int(config["max_position_embeddings"]) / original)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _yarn_attention(rope: Mapping[str, Any]) -> float | None:
    """YaRN's factor on the rotated values where the model does not leave it to the formula."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if not over or not under:
        return None
    factor = float(rope["factor"])
    return _magnitude(factor, float(over)) / _magnitude(factor, float(under))


def _magnitude(factor: float, share: float = 1.0) -> float:
    return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3_of(divisors: Tensor, theta: float, dimensions: int, where: str) -> dict[str, Any]:
    """The parameters whose divisors these are: Meta's, with the factor the tensor shows."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if divisors.shape != (dimensions // 2,) or not torch.allclose(
        llama3_divisors(rope, dimensions), divisors, rtol=1e-4
    ):
        raise Refused(
            "rope_freqs.weight holds frequencies that are not those of Llama 3", where=where, fix=_ELSEWHERE
        )
    return rope


def llama3_divisors(rope: Mapping[str, Any], dimensions: int) -> Tensor:
    """What every rotary frequency is divided by, ``dimensions / 2`` float32."""
    factor, low, high, original = (float(rope[name]) for name in _LLAMA3)
    exponents = torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - blend) / factor + blend)
