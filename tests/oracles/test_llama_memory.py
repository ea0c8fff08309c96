"""llama.cpp's own allocations, to the byte: weights, caches and states of every kind of architecture.

Models are made of keys alone, as small or as large as one likes; llama.cpp then plans its buffers without
allocating them. Files with weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from bitmill.advise.cache_types import GGML, cache_type
from bitmill.advise.memory import Model, Wanted, memory, step_bytes
from bitmill.advise.models import as_it_is
from bitmill.advise.runtimes import RUNTIMES
from bitmill.advise.shape_gguf import gguf_shape
from bitmill.advise.weights import Weights
from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_write import Planned, encoded, head
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.mill import quantize
from bitmill.source import embedded_model
from tests.oracles import llama_memory as theirs
from tests.test_gguf import EXTRA
from tests.tiny import CONFIGS, EXPERTS, make_model

pytestmark = pytest.mark.client
LLAMA_CPP = RUNTIMES["llama.cpp"]
SMALL: Mapping[str, Any] = {
    "vocab_size": 1000, "context_length": 4096, "embedding_length": 512, "block_count": 8,
    "feed_forward_length": 768, "attention.head_count": 8, "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 1.0,
    "residual_scale": 1.0, "embedding_scale": 1.0, "swiglu_clamp_exp": 7.0, "attention.clamp_kqv": 1.0,
}  # fmt: skip
LOCAL = {"attention.sliding_window": 100}
LISTED = {**LOCAL, "attention.sliding_window_pattern": [1, 1, 0, 1, 1, 0, 0, 1]}
MOE = {
    "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256, "expert_shared_count": 1,
    "expert_shared_feed_forward_length": 256, "expert_gating_func": 1, "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 2,
}  # fmt: skip
SOME_MOE = {**MOE, **LOCAL}
MLA = {
    **MOE, "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
    "attention.key_length_mla": 192, "attention.value_length_mla": 128, "rope.dimension_count": 64,
    "attention.q_lora_rank": 128, "attention.kv_lora_rank": 512,
}  # fmt: skip
INDEXED = {
    **MLA, "attention.indexer.head_count": 64, "attention.indexer.key_length": 128,
    "attention.indexer.top_k": 2048,
}  # fmt: skip
MAMBA = {"ssm.conv_kernel": 4, "ssm.inner_size": 1024, "ssm.state_size": 32, "ssm.time_step_rank": 16}
MAMBA2 = {**MAMBA, "ssm.group_count": 2}
DELTA = {**MAMBA, "ssm.state_size": 64, "ssm.group_count": 8, "full_attention_interval": 4}
SOME = {"attention.head_count_kv": [2, 0, 2, 0, 2, 0, 0, 2]}
RWKV = {
    "wkv.head_size": 64, "attention.decay_lora_rank": 32, "attention.iclr_lora_rank": 32,
    "attention.value_residual_mix_lora_rank": 32, "attention.gate_lora_rank": 32, "time_mix_extra_dim": 64,
    "time_decay_extra_dim": 128, "attention.head_count": 0, "attention.head_count_kv": 0,
}  # fmt: skip
NEMOTRON = {
    **MAMBA2, "attention.head_count_kv": [0, 0, 2, 0, 0, 0, 2, 0],
    "feed_forward_length": [0, 768, 0, 768, 0, 768, 0, 0],
}  # fmt: skip
DIFFERENT = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
GEMMA4 = {
    **LISTED, "attention.key_length": 128, "attention.value_length": 128, "attention.key_length_swa": 64,
    "attention.value_length_swa": 64, "embedding_length_per_layer_input": 64,
}  # fmt: skip
KIMI = {
    **MLA, "kda.head_dim": 64, "ssm.conv_kernel": 4, "attention.head_count_kv": [1, 0, 1, 0, 0, 0, 0, 1],
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "all heads": ("llama", {"attention.head_count_kv": 8}),
    "grouped heads": ("llama", {}),
    "one head": ("llama", {"attention.head_count_kv": 1}),
    "wide heads": ("qwen3", {"attention.key_length": 128, "attention.value_length": 128}),
    "keys wider than values": ("mimo2", {**MOE, **LISTED, "attention.key_length": 96}),
    "a window nobody heeds": ("llama", LOCAL),
    "experts": ("llama", MOE),
    "heads by block": ("openelm", {
        **DIFFERENT, "attention.head_count": [8, 8, 8, 4, 4, 4, 4, 4],
        "attention.head_count_kv": [2, 2, 2, 1, 1, 1, 4, 4], "feed_forward_length": [256] * 8,
    }),
    "blocks without attention": ("deci", {
        **DIFFERENT, "attention.head_count": [8, 8, 0, 8, 8, 0, 8, 8],
        "attention.head_count_kv": [2, 1, 0, 2, 8, 0, 4, 4],
    }),
    "shared keys": ("gemma4", {**GEMMA4, "attention.shared_kv_layers": 2}),
    "a latent and an indexer": ("deepseek32", INDEXED),
    "an indexer in some blocks": ("glm-dsa", {
        **INDEXED, "attention.indexer.types": [1, 0, 1, 1, 0, 1, 0, 1],
    }),
    "gemma2 by default": ("gemma2", {}),
    "gemma3, fourteen blocks": ("gemma3", {**LOCAL, "block_count": 14}),
    "exaone4, 64 blocks": ("exaone4", {"block_count": 64}),
    **{name: (name, {}) for name in ("qwen2", "phi3", "gemma", "gpt2", "command-r", "seed_oss")},
    **{name: (name, MOE) for name in ("qwen2moe", "qwen3moe", "phimoe", "glm4moe", "dbrx", "minimax-m2")},
    **{name: (name, LOCAL) for name in ("gemma3n", "cohere2", "olmo2", "plamo3", "exaone4", "muse-glimmer")},
    **{name: (name, SOME_MOE) for name in (
        "gpt-oss", "cohere2moe", "smallthinker", "exaone-moe", "afmoe", "laguna", "mellum", "llama4",
    )},
    **{name: (name, {**MOE, **LISTED}) for name in ("step35", "maple")},
    **{name: (name, LISTED) for name in ("spark2_5", "granite_swa")},
    **{name: (name, MLA) for name in ("deepseek2", "mistral4")},
    "mamba": ("mamba", MAMBA),
    "mamba2": ("mamba2", MAMBA2),
    "jamba": ("jamba", {**MAMBA, **SOME}),
    "falcon-h1": ("falcon-h1", MAMBA2),
    "granitehybrid": ("granitehybrid", {**MAMBA2, **SOME}),
    "plamo2": ("plamo2", {**MAMBA, **SOME, "ssm.group_count": 0}),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "qwen3next": ("qwen3next", {**MOE, **DELTA}),
    "qwen35": ("qwen35", {**DELTA, "rope.dimension_sections": [8, 8, 8, 8]}),
    "lfm2": ("lfm2", {"shortconv.l_cache": 3, **SOME}),
    "lfm2 with a window": ("lfm2", {"shortconv.l_cache": 3, **SOME, **LOCAL}),
    "rwkv6": ("rwkv6", RWKV),
    "rwkv7": ("rwkv7", RWKV),
}  # fmt: skip
RUNS: list[dict[str, Any]] = [
    {"context": 512},
    {"context": 300},
    {"context": 5000, "parallel": 3},
    {"context": 2048, "parallel": 2, "full_windows": True},
    {"context": 4096, "keys": "q8_0", "values": "q8_0"},
]


def keys_of(arch: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    every = {"general.architecture": arch, "tokenizer.ggml.model": "no_vocab"}
    return {**every, **{f"{arch}.{name}": value for name, value in {**SMALL, **numbers}.items()}}


def ours(metadata: Mapping[str, Any], run: Mapping[str, Any]) -> int:
    """Bytes of caches and states together, as llama.cpp counts them."""
    model = Model(gguf_shape(metadata, "x"), Weights(0), LLAMA_CPP)
    found = memory(model, wanted(**run))
    names = ("keys and values", "recurrent states")
    return sum(part.bytes_ for part in found.parts if part.name in names)


def wanted(
    context: int, parallel: int = 1, keys: str = "f16", values: str = "f16", full_windows: bool = False
) -> Wanted:
    return Wanted(context, parallel, (cache_type(keys), cache_type(values)), full_windows)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_caches_and_states(name: str, tmp_path: Path) -> None:
    metadata = keys_of(*ARCHITECTURES[name])
    for run in RUNS:
        assert ours(metadata, run) == theirs.of_keys(metadata, tmp_path, **run).context, run


@pytest.mark.parametrize("kind", GGML)
@pytest.mark.parametrize("name", ["grouped heads", "gemma3", "deepseek2", "falcon-h1"])
def test_every_type_of_cache(name: str, kind: str, tmp_path: Path) -> None:
    arch, numbers = ARCHITECTURES.get(name, (name, LOCAL))
    metadata = keys_of(arch, numbers)
    for keys, values in [(kind, kind)] if name == "deepseek2" else [(kind, kind), (kind, "f16")]:
        run = {"context": 3000, "parallel": 2, "keys": keys, "values": values}
        assert ours(metadata, run) == theirs.of_keys(metadata, tmp_path, **run).context, run


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-8B": ("llama", {
        "vocab_size": 128_256, "context_length": 8192, "embedding_length": 4096, "block_count": 32,
        "feed_forward_length": 14_336, "attention.head_count": 32, "attention.head_count_kv": 8,
    }),
    "Llama-3-70B": ("llama", {
        "vocab_size": 128_256, "context_length": 8192, "embedding_length": 8192, "block_count": 80,
        "feed_forward_length": 28_672, "attention.head_count": 64, "attention.head_count_kv": 8,
    }),
    "Qwen3-0.6B": ("qwen3", {
        "vocab_size": 151_936, "context_length": 40_960, "embedding_length": 1024, "block_count": 28,
        "feed_forward_length": 3072, "attention.head_count": 16, "attention.head_count_kv": 8,
        "attention.key_length": 128, "attention.value_length": 128,
    }),
    "Qwen3-30B-A3B": ("qwen3moe", {
        "vocab_size": 151_936, "context_length": 40_960, "embedding_length": 2048, "block_count": 48,
        "feed_forward_length": 6144, "attention.head_count": 32, "attention.head_count_kv": 4,
        "attention.key_length": 128, "attention.value_length": 128, "expert_count": 128,
        "expert_used_count": 8, "expert_feed_forward_length": 768,
    }),
    "Gemma-3-27B": ("gemma3", {
        "vocab_size": 262_208, "context_length": 131_072, "embedding_length": 5376, "block_count": 62,
        "feed_forward_length": 21_504, "attention.head_count": 32, "attention.head_count_kv": 16,
        "attention.key_length": 128, "attention.value_length": 128, "attention.sliding_window": 1024,
    }),
    "DeepSeek-V3": ("deepseek2", {
        **MLA, "vocab_size": 129_280, "context_length": 163_840, "embedding_length": 7168, "block_count": 61,
        "feed_forward_length": 18_432, "attention.head_count": 128, "attention.q_lora_rank": 1536,
        "expert_count": 256, "expert_used_count": 8, "expert_feed_forward_length": 2048,
        "leading_dense_block_count": 3,
    }),
    "gpt-oss-120b": ("gpt-oss", {
        "vocab_size": 201_088, "context_length": 131_072, "embedding_length": 2880, "block_count": 36,
        "feed_forward_length": 2880, "attention.head_count": 64, "attention.head_count_kv": 8,
        "attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 128,
        "expert_count": 128, "expert_used_count": 4, "expert_feed_forward_length": 2880,
    }),
}  # fmt: skip
LARGE = [
    {"context": 4096},
    {"context": 32_768, "parallel": 4, "keys": "q8_0", "values": "q8_0"},
    {"context": 131_072},
]


@pytest.mark.parametrize("name", REAL)
def test_models_as_large_as_they_are(name: str, tmp_path: Path) -> None:
    metadata = keys_of(*REAL[name])
    for run in LARGE:
        found = theirs.of_keys(metadata, tmp_path, **run)
        assert ours(metadata, run) == found.context, run
        step = step_bytes(gguf_shape(metadata, "x"), LLAMA_CPP, wanted(**run))
        print(f"{name} {run}: a step is {step / found.compute:.3f} of llama.cpp's {found.compute}")
        assert 0.9 < step / found.compute < 1.1, (run, step, found.compute)


NEXTN = {"eh_proj": (512, 1024), "enorm": (512,), "hnorm": (512,), "shared_head_norm": (512,)}
UNSAVED = ("gemma3n", "step35", "shared keys")
"""Architectures that llama.cpp does not write, or (gemma4) writes without a key that it needs."""


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in UNSAVED])
def test_weights_of_files(name: str, tmp_path: Path) -> None:
    path = theirs.save(keys_of(*ARCHITECTURES[name]), tmp_path)
    assert_weights(path)


@pytest.mark.parametrize("family", [*CONFIGS, *EXPERTS])
@pytest.mark.parametrize("recipe", ["nearest : Q4_K_M > gguf", "nearest : q8_0, fallback=q4_0 > gguf"])
def test_weights_of_what_we_write(family: str, recipe: str, tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", family, **EXTRA.get(family, {})))
    quantize(source, recipe, tmp_path / "out.gguf")
    assert_weights(tmp_path / "out.gguf")


def test_the_carried_model() -> None:
    assert_weights(embedded_model())


@pytest.mark.parametrize("name", ["glm4moe", "deepseek2", "qwen35"])
def test_a_block_that_predicts_further_is_not_loaded(name: str, tmp_path: Path) -> None:
    """The last of eight blocks is made one: llama.cpp then neither loads it nor gives it a cache."""
    made = GgufFile(theirs.save(keys_of(*ARCHITECTURES[name]), tmp_path))
    keys = {**made.raw_keys, f"{name}.nextn_predict_layers": encoded(1)}
    kept = [t for t in made.tensors.values() if not (t.name.startswith("blk.7.") and "scale" in t.name)]
    tensors = [Planned(t.name, t.shape, int(t.type), t.bytes_) for t in kept]
    for part, shape in NEXTN.items():
        tensors.append(Planned(f"blk.7.nextn.{part}.weight", shape, 0, 4 * prod(shape)))
    header, _, size = head(keys, tensors)
    with (tmp_path / "ahead.gguf").open("wb") as file:
        file.write(header)
        file.truncate(size)
    model, found = as_it_is(tmp_path / "ahead.gguf"), theirs.of_file(tmp_path / "ahead.gguf", real=True)
    assert model.weights.bytes_ == found.model < made.bytes_ - 2_000_000
    assert ours(GgufFile(tmp_path / "ahead.gguf").metadata, {"context": 512}) == found.context


def assert_weights(path: Path) -> None:
    """Loaded, planned and mapped: a map of the file ends where the last tensor does, without its padding."""
    weights = as_it_is(path).weights.bytes_
    assert weights == theirs.of_file(path, real=True).model == theirs.of_file(path).model
    mapped = theirs.of_file(path, mapped=True).model
    tensors = GgufFile(path).tensors.values()
    assert mapped == max(t.offset + t.bytes_ for t in tensors) - min(t.offset for t in tensors)
    assert 0 <= weights - mapped < 32
