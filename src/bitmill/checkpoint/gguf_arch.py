"""llama.cpp's architectures as data: how tensors are called and laid out, next to Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitmill.core.errors import Refused
from bitmill.core.experts import expert_of, stack_of

_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FUSED = {
    **{k: v for k, v in _BLOCK.items() if v not in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")},
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ATTENTION = {k: v for k, v in _BLOCK.items() if not k.startswith("mlp.")}
_MIXTRAL_EXPERTS = {
    f"block_sparse_moe.experts.{{}}.w{i}": f"ffn_{n}_exps" for i, n in ((1, "gate"), (3, "up"), (2, "down"))
}
_QWEN_EXPERTS = {f"mlp.experts.{{}}.{n}_proj": f"ffn_{n}_exps" for n in ("gate", "up", "down")}
_HF_BLOCK = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_GGUF_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)\.(weight|bias)$")
_RECOMPUTED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: ``general.architecture``.
        model_types: Hugging Face's ``model_type`` values it holds; a file is read back as the first.
        causal: the model class that ``config.json`` names.
        block: module path inside a block to llama.cpp's name.
        permuted: rows of q and k are stored with the two halves of each head interleaved.
        norm_offset: added to every norm's weight in the file, because ggml multiplies by ``w`` alone.
        experts: module path of one expert, ``{}`` for its number, to llama.cpp's name of the stack of all.
        partly_rotated: whether a head may have values that positions do not rotate.
    """

    name: str
    model_types: tuple[str, ...]
    causal: str
    block: Mapping[str, str]
    permuted: bool = False
    norm_offset: float = 0.0
    partly_rotated: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)

    def gguf_name(self, name: str) -> str | None:
        """llama.cpp's name of a canonical tensor, for an expert's that of its stack; None for buffers that no
        file needs.

        Raises:
            Refused: this architecture has no such tensor.
        """
        if name.endswith(_RECOMPUTED):
            return None
        stem, _, kind = name.rpartition(".")
        if stem in _OUTSIDE and kind == "weight":
            return f"{_OUTSIDE[stem]}.weight"
        found = _HF_BLOCK.match(name)
        paths = {**self.block, **self.experts}
        path = stack_of(found[2]) if found is not None else ""
        if found is None or path not in paths:
            raise Refused(
                f"llama.cpp's architecture {self.name!r} has no place for tensor {name!r}",
                fix="write a container of the safetensors kind, for example compressed-tensors",
            )
        return f"blk.{found[1]}.{paths[path]}.{found[3]}"

    def expert(self, name: str) -> int | None:
        """The number of the expert whose tensor this canonical name is; None for a tensor of its own."""
        return expert_of(name) if self.experts else None

    def hf_name(self, name: str) -> str | None:
        """The canonical name of one of llama.cpp's tensors, or None when it has none; of a stack, with ``{}``
        for the expert."""
        stem, _, kind = name.rpartition(".")
        outside = {v: k for k, v in _OUTSIDE.items()}
        if stem in outside and kind == "weight":
            return f"{outside[stem]}.weight"
        found = _GGUF_BLOCK.match(name)
        paths = {v: k for k, v in {**self.block, **self.experts}.items()}
        if found is None or found[2] not in paths:
            return None
        return f"model.layers.{found[1]}.{paths[found[2]]}.{found[3]}"

    def is_permuted(self, name: str) -> bool:
        """Whether the rows of this canonical tensor are stored in another order."""
        return self.permuted and (".self_attn.q_proj." in name or ".self_attn.k_proj." in name)

    def offset(self, name: str) -> float:
        """What the file adds to the values of this canonical tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


_ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), "LlamaForCausalLM", _BLOCK, permuted=True),
    Architecture(
        "llama",
        ("mixtral",),
        "MixtralForCausalLM",
        {**_ATTENTION, "block_sparse_moe.gate": "ffn_gate_inp"},
        permuted=True,
        experts=_MIXTRAL_EXPERTS,
    ),
    Architecture(
        "qwen3moe",
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_HEAD_NORMS, "mlp.gate": "ffn_gate_inp"},
        experts=_QWEN_EXPERTS,
    ),
    Architecture("qwen2", ("qwen2",), "Qwen2ForCausalLM", _BLOCK),
    Architecture("qwen3", ("qwen3",), "Qwen3ForCausalLM", {**_BLOCK, **_HEAD_NORMS}),
    Architecture("phi3", ("phi3",), "Phi3ForCausalLM", _FUSED, partly_rotated=True),
    Architecture("gemma2", ("gemma2",), "Gemma2ForCausalLM", {**_BLOCK, **_FOUR_NORMS}, norm_offset=1.0),
    Architecture(
        "gemma3",
        ("gemma3_text",),
        "Gemma3ForCausalLM",
        {**_BLOCK, **_HEAD_NORMS, **_FOUR_NORMS},
        norm_offset=1.0,
    ),
)


def architecture_of_file(metadata: Mapping[str, Any], where: str) -> Architecture:
    """The architecture a file names.

    Raises:
        Refused: none of those described here.
    """
    name = metadata.get("general.architecture")
    mixed = bool(metadata.get(f"{name}.expert_count", 0))
    for known in _ARCHITECTURES:
        if known.name == name and bool(known.experts) == mixed:
            return known
    readable = ", ".join(dict.fromkeys(a.name for a in _ARCHITECTURES))
    raise Refused(
        f"GGUF architecture {name!r}{' with experts' * mixed} is not one that can be read",
        where=where,
        fix=f"use one of: {readable}; or start from the safetensors model",
    )


def architecture_of_model(config: Mapping[str, Any]) -> Architecture:
    """The architecture that holds a model of this configuration.

    Raises:
        Refused: no architecture described here does.
    """
    model_type = config.get("model_type")
    for known in _ARCHITECTURES:
        if model_type in known.model_types:
            return known
    types = ", ".join(t for a in _ARCHITECTURES for t in a.model_types)
    raise Refused(
        f"a model of type {model_type!r} cannot be written as GGUF",
        fix=f"GGUF works for model types {types}; others go into compressed-tensors",
    )


def interleaved(rows: int, head_dim: int) -> Tensor:
    """Row order of a stored q or k: its row ``h·D + 2i + half`` is row ``h·D + half·D/2 + i`` of the model.

    llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head; the reordering makes both
    the same rotation.
    """
    return torch.arange(rows).reshape(rows // head_dim, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def restored(rows: int, head_dim: int) -> Tensor:
    """The inverse of :func:`interleaved`."""
    return torch.argsort(interleaved(rows, head_dim))
