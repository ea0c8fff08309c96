"""llama.cpp's own quantizer chooses what our tables say, tensor for tensor, on models with two rows a matrix.

Only what the rules look at is real in these models: blocks, heads, experts, columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from bitmill.allocation.mixture import Mixture, demands_importance
from bitmill.containers.gguf import MIXTURES
from bitmill.core.axes import Weight
from bitmill.numerics.blocks import type_of

pytestmark = pytest.mark.client
ROLES = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
    "ffn_gate_exps": "gate",
    "ffn_up_exps": "up",
    "ffn_down_exps": "down",
}


class Failed(Exception):
    """llama.cpp did not quantize."""


@dataclass(frozen=True)
class Shape:
    """What the rules look at: an architecture, its blocks and heads, and the columns of its matrices."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False
    columns: int = 256
    traits: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        found = {"heads": self.heads, "kv_heads": self.kv_heads, "experts": self.experts}
        object.__setattr__(self, "traits", {**found, "tied": int(self.tied)})

    def names(self) -> Iterator[tuple[str, str, int | None]]:
        yield "token_embd.weight", "embed", None
        if not self.tied:
            yield "output.weight", "head", None
        for layer in range(self.layers):
            for part, role in ROLES.items():
                if not part.startswith("ffn") or part.endswith("_exps") == bool(self.experts):
                    yield f"blk.{layer}.{part}.weight", role, layer

    def tensor(self, name: str) -> tuple[int, ...]:
        return (self.experts, 2, self.columns) if "_exps" in name else (2, self.columns)


SHAPES = {
    "Llama-3-8B": Shape("llama", 32, 32, 8),
    "Llama-2-7B": Shape("llama", 32, 32, 32),
    "Llama-3-70B": Shape("llama", 80, 64, 8),
    "Mixtral-8x7B": Shape("llama", 32, 32, 8, experts=8),
    "Qwen3-30B-A3B with fewer experts": Shape("qwen3moe", 48, 32, 4, experts=16),
    "Gemma-3-4B": Shape("gemma3", 34, 8, 4, tied=True),
    "SmolLM2-135M": Shape("llama", 30, 9, 3, tied=True, columns=576),
    "SmolLM2-135M, untied": Shape("llama", 30, 9, 3, columns=576),
}


def written(shape: Shape, path: Path) -> Path:
    """A file of ``shape`` with two rows a matrix."""
    writer = gguf.GGUFWriter(str(path), shape.arch)
    writer.add_block_count(shape.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(shape.heads * 64)
    writer.add_feed_forward_length(256)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(2)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(256)
    if shape.arch == "gemma3":
        writer.add_sliding_window(64)
    values = np.random.default_rng(0)
    for name, _, _ in shape.names():
        writer.add_tensor(name, values.standard_normal(shape.tensor(name)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def importance(shape: Shape) -> tuple[object, object]:
    """An importance of one for every channel, and what must stay alive while it is used."""
    ones = (ctypes.c_float * (max(shape.experts, 1) * shape.columns))()
    ones[:] = [1.0] * len(ones)
    names = [name for name, _, _ in shape.names()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    for entry, name in zip(entries, names, strict=False):
        entry.name = name.encode()
        entry.data = ones
        entry.size = (shape.experts if "_exps" in name else 1) * shape.columns
    return entries, ones


def theirs(
    source: Path,
    shape: Shape,
    name: str,
    *,
    told: bool = True,
    pure: bool = False,
    output: str | None = None,
    embedding: str | None = None,
    tensors: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """The type llama.cpp stores every tensor in."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = MIXTURES[name], pure, 1
    if told:
        entries, _alive = importance(shape)
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    if output is not None:
        params.output_tensor_type = gguf.GGMLQuantizationType[output.upper()]
    if embedding is not None:
        params.token_embedding_type = gguf.GGMLQuantizationType[embedding.upper()]
    if tensors:
        overrides = (llama_cpp.llama_model_tensor_override * (len(tensors) + 1))()
        for entry, (pattern, kind) in zip(overrides, tensors, strict=False):
            entry.pattern = pattern.encode()
            entry.type = gguf.GGMLQuantizationType[kind.upper()]
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    out = source.with_name("out.gguf")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise Failed(name)
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(out).tensors}


def ours(
    shape: Shape,
    name: str,
    *,
    told: bool = True,
    pure: bool = False,
    output: str | None = None,
    embedding: str | None = None,
    tensors: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """The type our table gives every tensor; types of roles come before it, as in a plan."""
    mixture = Mixture(name, pure, tuple(tensors), output)
    roles = {"embed": embedding, "head": output}
    found = {}
    for tensor, role, layer in shape.names():
        traits = {**shape.traits, "imatrix": int(told)}
        weight = Weight(tensor, role, layer, shape.tensor(tensor), shape.layers, traits, tensor)
        choice = mixture.choose(weight)
        assert choice is not None
        found[tensor] = roles.get(role) or type_of(choice.grid)
    return found


def demanding(shape: Shape, name: str) -> bool:
    """Whether llama.cpp refuses the mixture for a model whose inputs are unknown."""
    types = ours(shape, name, told=False)
    return any(demands_importance(name, role, types[tensor]) for tensor, role, _ in shape.names())


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shape]:
    shape = SHAPES[request.param]
    return written(shape, tmp_path_factory.mktemp("shape") / "source.gguf"), shape


@pytest.mark.parametrize("name", Mixture.names())
def test_every_tensor_of_every_mixture(source: tuple[Path, Shape], name: str) -> None:
    path, shape = source
    assert ours(shape, name) == theirs(path, shape, name)


@pytest.mark.parametrize("name", Mixture.names())
def test_and_where_the_inputs_are_unknown(source: tuple[Path, Shape], name: str) -> None:
    path, shape = source
    if not demanding(shape, name):
        assert ours(shape, name, told=False) == theirs(path, shape, name, told=False)
    else:
        with pytest.raises(Failed):
            theirs(path, shape, name, told=False)


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ2_M", "MXFP4_MOE"])
@pytest.mark.parametrize(
    "changed",
    [
        {"pure": True},
        {"output": "q5_0"},
        {"embedding": "q5_1"},
        {"output": "q5_0", "embedding": "q5_1", "pure": True},
        {"tensors": [(r"blk\.[0-3]\.ffn_", "q6_k"), ("ffn_(up|down)", "q8_0"), ("^output|embd", "q4_1")]},
        {"tensors": [("out", "q4_1"), ("embd", "f16")], "output": "q5_0"},
        {"tensors": [("out|embd", "q4_1")], "embedding": "q5_1", "pure": True},
    ],
    ids=str,
)
def test_what_is_said_about_single_tensors(
    source: tuple[Path, Shape], name: str, changed: dict[str, Any]
) -> None:
    path, shape = source
    assert ours(shape, name, **changed) == theirs(path, shape, name, **changed)
