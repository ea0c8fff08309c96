"""A GGUF file as a checkpoint like any other: Hugging Face's names, row order, configuration, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, final

import torch
from torch import Tensor

from bitmill.checkpoint.gguf import GgufFile, GgufTensor, scale_of
from bitmill.checkpoint.gguf_arch import architecture_of_file, restored
from bitmill.checkpoint.gguf_config import config_of
from bitmill.checkpoint.gguf_rope import ROPE_TENSORS, head_width
from bitmill.checkpoint.tokenizer_gguf import files_of
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile
from bitmill.core.registry import parse_grid
from bitmill.core.types import Quantized, TensorFacts
from bitmill.numerics import blocks

SCALES = ("scale", "input_scale")
"""What may stand beside an NVFP4 tensor; the second is about activations."""
_STACKED = 3  # dimensions of a stack of experts
_MATRIX = 2
_MOST_EXPERTS = 4096
_ROUTERS = ("block_sparse_moe.gate", "mlp.gate")
_KEPT = {"F16": "f16", "BF16": "bf16"}


@final
class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file.

    What llama.cpp's converter changed is undone: rows of q and k are back in Hugging Face's order, Gemma's
    norms are without the 1 that was added. Tensors that have no Hugging Face name are in :attr:`extras`.

    Attributes:
        path: the (first) file.
        file: the container.
        arch: llama.cpp's architecture.

    Raises:
        BadFile: the file does not add up, or holds tensors its architecture does not have.
        Refused: an architecture that is not known here.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.path = self.file.path
        self.arch = architecture_of_file(self.file.metadata, str(self.path))
        self._records = MappingProxyType(self._canonical())
        self._config = MappingProxyType(config_of(self.file, self.arch))
        self._check_shapes()

    def _canonical(self) -> dict[str, GgufTensor]:
        records = {}
        beside = {scale_of(n, of) for n, t in self.file.tensors.items() if _is_nvfp4(t) for of in SCALES}
        for name, tensor in self.file.tensors.items():
            ours = self.arch.hf_name(name)
            if ours is not None and "{}" in ours:
                records.update(self._experts(ours, tensor))
            elif ours is not None:
                records[ours] = tensor
            elif name not in ROPE_TENSORS and name not in beside:
                raise BadFile(
                    f"tensor {name!r} is not one of architecture {self.arch.name!r}", where=str(self.path)
                )
        return records

    def _experts(self, template: str, stack: GgufTensor) -> dict[str, GgufTensor]:
        """Every expert's part of a stack, by canonical name."""
        count = self.file.metadata.get(f"{self.arch.name}.expert_count")
        if len(stack.shape) != _STACKED or stack.shape[0] != count or count > _MOST_EXPERTS:
            raise BadFile(
                f"{stack.name} has shape {stack.shape}; the keys say {count} experts", where=str(self.path)
            )
        size = stack.bytes_ // count
        part = replace(stack, shape=stack.shape[1:], bytes_=size)
        return {template.format(e): replace(part, offset=stack.offset + e * size) for e in range(count)}

    def _check_shapes(self) -> None:
        """Refuse shapes that contradict the keys before anybody reshapes by them."""
        c = self._config
        hidden, middle, head = c["hidden_size"], c["intermediate_size"], head_width(c)
        q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        block = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "pre_feedforward_layernorm": (hidden,),
            "post_feedforward_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.qkv_proj": (q + 2 * kv, hidden),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.gate_up_proj": (2 * middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }
        experts = c.get("num_local_experts") or c.get("num_experts") or 0
        block.update(dict.fromkeys(_ROUTERS, (experts, hidden)))
        self._check("model.norm", (hidden,))
        for layer in range(c["num_hidden_layers"]):
            for path in self.arch.block:
                self._check(f"model.layers.{layer}.{path}", block[path])
            for path, role in self.arch.experts.items():
                wide = c.get("moe_intermediate_size", middle)
                shape = (hidden, wide) if role == "ffn_down_exps" else (wide, hidden)
                for expert in range(experts):
                    self._check(f"model.layers.{layer}.{path.format(expert)}", shape)

    def _check(self, module: str, shape: tuple[int, ...]) -> None:
        found, bias = self._records.get(f"{module}.weight"), self._records.get(f"{module}.bias")
        if found is None or found.shape != shape:
            said = "missing" if found is None else f"of shape {found.shape}"
            raise BadFile(f"tensor {module}.weight is {said}; the keys say {shape}", where=str(self.path))
        if bias is not None and bias.shape != shape[:1]:
            raise BadFile(f"tensor {module}.bias has shape {bias.shape}", where=str(self.path))

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @cached_property
    def _facts(self) -> Mapping[str, TensorFacts]:
        return MappingProxyType(
            {n: TensorFacts(n, t.shape, _KEPT.get(t.type.name, "f32")) for n, t in self._records.items()}
        )

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    def read(self, name: str) -> Tensor:
        if self._gain(self._record(name)) is not None:
            return cast(Quantized, self.stored(name)).dense()
        values = self.file.dense(self._record(name))
        if self.arch.is_permuted(name):
            values = values[restored(values.shape[0], head_width(self._config))]
        offset = self.arch.offset(name)
        return values - offset if offset else values

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start … stop`` of what :meth:`read` gives, decoded without the others."""
        record = self._record(name)
        if len(record.shape) < _MATRIX or self._gain(record) is not None or self.arch.offset(name):
            return self.read(name)[start:stop]
        count, row = record.shape[0], record.bytes_ // record.shape[0]
        order = torch.arange(count)
        if self.arch.is_permuted(name):
            order = restored(count, head_width(self._config))
        wanted = order[start:stop]
        first, last = int(wanted.min()), int(wanted.max()) + 1
        shape, place = (last - first, *record.shape[1:]), record.offset + first * row
        part = replace(record, shape=shape, offset=place, bytes_=shape[0] * row)
        return self.file.dense(part)[wanted - first]

    def stored(self, name: str) -> Quantized | None:
        record = self._record(name)
        kind = record.type.name.lower()
        if kind not in blocks.TYPES or not record.shape:
            return None
        rows = prod(record.shape[:-1])
        grid = parse_grid(kind)
        if self.arch.offset(name):
            return Quantized(grid, self.read(name), {}, record.shape)  # type: ignore[arg-type]
        codes, params = blocks.unpack(kind, self.file.raw(record).reshape(rows, -1))
        gain = self._gain(record)
        if gain is not None:
            params["gain"] = gain
        elif kind == "nvfp4":
            grid = parse_grid("nvfp4-flat")
        if not params:
            codes = codes.reshape(record.shape)
        quantized = Quantized(grid, codes, params, record.shape)  # type: ignore[arg-type]
        if self.arch.is_permuted(name):
            return quantized.rows(restored(record.shape[0], head_width(self._config)))
        return quantized

    def type_of(self, name: str) -> str:
        """The type that stores a tensor, in lower case: ``q4_k``."""
        return self._record(name).type.name.lower()

    def _gain(self, record: GgufTensor) -> Tensor | None:
        """What an NVFP4 tensor was multiplied with before its blocks were scaled, if the file says so; of a
        stack, the part of the expert that ``record`` is."""
        name = scale_of(record.name)
        if not _is_nvfp4(record) or name not in self.file.tensors:
            return None
        whole = self.file.tensors[record.name]
        parts = whole.bytes_ // record.bytes_
        found = prod(self.file.tensors[name].shape)
        if found != parts:
            raise BadFile(f"tensor {name!r} holds {found} numbers, not {parts}", where=str(self.path))
        scale = self.file.dense(name).to(torch.float32).reshape(-1)
        gain = 1 / scale[(record.offset - whole.offset) // record.bytes_]
        if not (bool(gain.isfinite()) and float(gain) > 0):
            raise BadFile(f"tensor {name!r} is not of positive numbers", where=str(self.path))
        return gain

    def _record(self, name: str) -> GgufTensor:
        if name not in self._records:
            raise BadFile(f"there is no tensor called {name!r}", where=str(self.path))
        return self._records[name]

    @cached_property
    def extras(self) -> Mapping[str, Tensor]:
        """Tensors without a Hugging Face name, by llama.cpp's name."""
        return {n: self.file.dense(n).to(torch.float32) for n in self.file.tensors if n in ROPE_TENSORS}

    @cached_property
    def _carried(self) -> Mapping[str, bytes]:
        return MappingProxyType(files_of(self.file.metadata, str(self.path)))

    @property
    def carried(self) -> Mapping[str, bytes]:
        return self._carried

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.file.metadata

    @property
    def digest(self) -> str:
        return self.file.digest


def _is_nvfp4(tensor: GgufTensor) -> bool:
    return tensor.type.name == "NVFP4"
