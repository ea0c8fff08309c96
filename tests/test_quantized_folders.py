"""Folder layouts word by word, settings that name the right layers, and folders that other people wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.checkpoint.patterns import patterns
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.auto_round import AutoRound
from bitmill.containers.awq import Awq
from bitmill.containers.bitmill import Bitmill
from bitmill.containers.compressed_tensors import CompressedTensors
from bitmill.containers.gptq import Gptq
from bitmill.core.axes import Container
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Quantized, Row
from bitmill.grids.integer import Integer
from bitmill.mill import quantize
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_path, open_source
from tests.tiny import make_model
from tests.written import Written, rows_of, write

NAME = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NAME}.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    folder = tmp_path_factory.mktemp("model")
    return SafetensorsFolder(make_model(folder, "llama", tied=True, dtype="bfloat16"))


def written(container: Container, source: SafetensorsFolder, grid: str, out: Path, **other: str) -> Written:
    adapted = {role: container.adapt(parse_grid(text), "bf16") for role, text in other.items()}
    rows = rows_of(container, source, "bf16", container.adapt(parse_grid(grid), "bf16"), adapted)
    return write(container, source, rows, out)


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def packed(
    container: Container,
    grid: Integer,
    codes: torch.Tensor,
    source: SafetensorsFolder,
    **params: torch.Tensor,
) -> dict[str, torch.Tensor]:
    shape = (codes.shape[0], codes.shape[1])
    row = Row(WEIGHT, "up", 0, shape, grid, True, "test")
    parts = container.pack(row, Quantized(grid, codes.to(torch.uint8), params, shape), source)
    return {
        k.removeprefix(f"{NAME}."): torch.frombuffer(bytearray(v), dtype=torch.int32)
        for k, v in parts.items()
        if "scale" not in k
    }


def words(tensor: torch.Tensor) -> set[int]:
    return {int(v) & 0xFFFFFFFF for v in tensor}


def test_gptq_words(source: SafetensorsFolder) -> None:
    grid, codes = Integer(4, 0, "sym", "f16"), (torch.arange(32) % 8).expand(32, 32)
    parts = packed(Gptq(), grid, codes, source, scale=torch.ones(32, 1))
    assert words(parts["qweight"]) == {0x76543210} and words(parts["qzeros"]) == {0x77777777}
    assert words(parts["g_idx"]) == {0}
    parts = packed(Gptq(), Integer(3, 0, "sym", "f16"), codes, source, scale=torch.ones(32, 1))
    rows = parts["qweight"].reshape(3, 32)
    assert [words(r) for r in rows] == [{0x88FAC688}, {0xC688FAC6}, {0xFAC688FA}]
    zero = torch.tensor([1.0, 3, 7, 8, 15, 1, 2, 9] * 4)[:, None]
    grid = Integer(4, 0, "asym", "f16", 1)
    parts = packed(Gptq(), grid, codes, source, scale=torch.ones(32, 1), zero=zero)
    assert words(parts["qzeros"]) == {0x810E7620}
    with pytest.raises((ValueError, RuntimeError)):
        packed(Gptq(), grid, codes, source, scale=torch.ones(32, 1), zero=zero - 1)


def test_awq_words(source: SafetensorsFolder) -> None:
    grid, codes = Integer(4, 0, "asym", "f16"), (torch.arange(32) % 8)[:, None].expand(32, 32)
    zero = (torch.arange(32) % 8).float()[:, None]
    parts = packed(Awq(), grid, codes, source, scale=torch.ones(32, 1), zero=zero)
    assert words(parts["qweight"]) == words(parts["qzeros"]) == {0x75316420}
    assert set(parts) == {"qweight", "qzeros"} and parts["qweight"].numel() == 32 * 4
    sym = packed(Awq(), Integer(4, 0, "sym", "f16"), codes, source, scale=torch.ones(32, 1))
    assert words(sym["qzeros"]) == {0x88888888}


def test_gptq_version_two_words(source: SafetensorsFolder) -> None:
    zero = torch.tensor([0.0, 3, 7, 8, 15, 1, 2, 9] * 4)[:, None]
    codes, grid = torch.zeros(32, 32), Gptq(version=2).adapt(Integer(4, 0, "asym"), "f32")
    assert isinstance(grid, Integer) and grid.zero_floor == 0
    parts = packed(Gptq(version=2), grid, codes, source, scale=torch.ones(32, 1), zero=zero)
    assert words(parts["qzeros"]) == {0x921F8730}
    with pytest.raises(ValueError, match="not adapted"):
        packed(Gptq(), grid, codes, source, scale=torch.ones(32, 1), zero=zero)


def test_compressed_tensors_words(source: SafetensorsFolder) -> None:
    codes = (torch.arange(32) % 8).expand(32, 32)  # -8 … -1, offset by 8
    grid = Integer(4, 0, "asym", "bf16")
    zero = (torch.arange(32) % 8).float()[:, None]
    parts = packed(CompressedTensors(), grid, codes, source, scale=torch.ones(32, 1), zero=zero)
    assert words(parts["weight_packed"]) == words(parts["weight_zero_point"]) == {0x76543210}
    assert parts["weight_shape"].view(torch.int64).tolist() == [32, 32]


def test_a_container_never_rounds_a_scale(source: SafetensorsFolder) -> None:
    codes = torch.zeros(32, 32)
    for container, precision in ((Gptq(), "f16"), (CompressedTensors(), "bf16"), (Bitmill(), "f16")):
        with pytest.raises(ValueError, match="not adapted"):
            packed(
                container, Integer(4, 0, "sym", precision), codes, source, scale=torch.full((32, 1), 1 / 3)
            )


def test_patterns_mean_exactly_the_chosen() -> None:
    everything = [f"model.layers.{i}.{p}" for i in range(12) for p in ("a.q", "a.q_norm", "m.up")] + [
        "lm_head"
    ]
    for chosen in (everything[:1], everything[::3], everything[1::2], everything, ["lm_head"], []):
        found = patterns(chosen, everything)
        matched = [n for n in everything if any(re.match(t, n) if r else t == n for t, r in found)]
        assert matched == [n for n in everything if n in set(chosen)]
        assert len(found) <= 4


def test_settings_of_one_grid(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(CompressedTensors(), source, "int4-g32-asym", tmp_path)
    found = settings_of(out.path)
    assert (found["quant_method"], found["format"], found["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    about = {k: group["weights"][k] for k in ("num_bits", "type", "symmetric", "strategy", "group_size")}
    assert about == {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    stored = load_file(out.path / "model.safetensors")
    assert "lm_head.weight" not in stored and stored["model.embed_tokens.weight"].dtype is torch.bfloat16
    assert stored[f"{NAME}.weight_scale"].dtype is torch.bfloat16


def test_settings_of_gptq(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(Gptq(), source, "int3-channel-asym", tmp_path)
    found = settings_of(out.path)
    assert found == json.loads((out.path / "quantize_config.json").read_text())
    wanted = {"bits": 3, "group_size": -1, "desc_act": False, "sym": False, "checkpoint_format": "gptq"}
    assert {k: found[k] for k in wanted} == wanted and "meta" not in found


def test_gptq_refuses_what_its_readers_cannot(source: SafetensorsFolder, tmp_path: Path) -> None:
    kept = written(Gptq(), source, "int4-g32-sym", tmp_path / "kept", o="bf16")
    (skip,) = settings_of(kept.path)["dynamic"]
    assert re.match(skip.removeprefix("-:"), "model.layers.2.self_attn.o_proj")
    rows = [
        r if r.layer != 1 or r.role != "o" else parsed(r, "bf16")
        for r in rows_of(Gptq(), source, "bf16", parse_grid("int4-g32-sym-sf16"))
    ]
    with pytest.raises(Refused, match="every block or in none"):
        Gptq().files(rows, source, {})


MIXED = {"q": "int8-channel-sym", "k": "int8-channel-sym", "down": "int8-g64-asym", "v": "int4-g32-asym"}


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_rules(source: SafetensorsFolder, tmp_path: Path, version: int) -> None:
    """The commonest bits and groups in the settings, a rule for each of the others."""
    out = written(Gptq(version=version), source, "int4-g32-sym", tmp_path, **MIXED, o="bf16")
    found = settings_of(out.path)
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 32, False)  # v has zero points
    rules = {text: change for text, change in found["dynamic"].items() if text.startswith("+:")}
    assert len(rules) == 3 and len(found["dynamic"]) == 4
    for path, wanted in (
        ("self_attn.q_proj", {"bits": 8, "group_size": -1, "sym": True}),
        ("mlp.down_proj", {"bits": 8, "group_size": 64, "sym": False}),
        ("mlp.up_proj", None),
    ):
        matched = [c for text, c in rules.items() if re.match(text[2:], f"model.layers.2.{path}")]
        assert matched == ([] if wanted is None else [wanted])
    again = open_path(out.path)
    for name, quantized in out.quantized.items():
        stored = again.stored(name)
        assert torch.equal(again.read(name).float(), quantized.dense())
        assert stored is None or (
            stored.same_values(quantized) and torch.equal(stored.codes, quantized.codes)
        )
    assert str(again.stored("model.layers.1.mlp.down_proj.weight").grid).startswith("int8-g64-asym")  # type: ignore[union-attr]


def test_gptq_rules_of_single_blocks(source: SafetensorsFolder, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    out = written(Gptq(), source, "int4-g32-sym", tmp_path, **{name: "int2-g64-sym"})
    (rule,) = settings_of(out.path)["dynamic"]
    assert rule.startswith("+:") and not re.match(rule[2:], "model.layers.0.mlp.up_proj")
    assert open_path(out.path).stored(name).same_values(out.quantized[name])  # type: ignore[union-attr]


def test_gptq_rules_as_gptqmodel_reads_them(source: SafetensorsFolder, tmp_path: Path) -> None:
    """The first that matches decides, from the beginning of the path; without a sign it means +:."""
    out = written(Gptq(), source, "int4-g32-sym", tmp_path, down="int8-g64-sym", o="bf16")
    down, left = {"bits": 8, "group_size": 64, "sym": True}, {r"-:.*o_proj": {}}
    every = {r".*": {"bits": 4}}
    for rules in (
        {r"model\.layers\.\d+\.mlp\.down": down, **left, **every},
        {r"+:.*down_proj": {**down, "desc_act": False, "damp_percent": 0.1}, **left},
        {**left, r"mlp": {"bits": 2}, r"down_proj": {"bits": 3}, r".*mlp.down": down},
    ):
        reconfigured(out.path, dynamic=rules)
        again = open_path(out.path)
        assert all(torch.equal(again.read(n).float(), q.dense()) for n, q in out.quantized.items())


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({".*": {"bits": 4}, ".*down_proj": {"bits": 8}}, "words"),
        ({"-:.*down_proj": {}}, "says that it is not"),
        ({".*down_proj": {"bits": 5}}, "5 bits"),
        ({".*down_proj": {"bits": "8"}}, "bits"),
        ({".*down_proj": {"bits": 8, "pack_dtype": "int8"}}, "cannot be read"),
        ({".*down_proj": {"bits": 8, "group_size": 128}}, "groups"),
        ({".*down_proj": {"bits": 8, "group_size": 0}}, "no number of inputs"),
        ({".*down_proj": 8}, "says nothing"),
        ({"(": {"bits": 8}}, "not a pattern"),
        ({"a" * 5000: {"bits": 8}}, "too long"),
        ([8], "no rules"),
    ],
)
def test_gptq_rules_that_cannot_be(
    source: SafetensorsFolder, tmp_path: Path, rules: object, said: str
) -> None:
    out = written(Gptq(), source, "int4-g32-sym", tmp_path, down="int8-g32-sym")
    reconfigured(out.path, dynamic=rules)
    with pytest.raises((BadFile, Refused), match=said):
        open_path(out.path)


def parsed(row: Row, grid: str) -> Row:
    return Row(row.name, row.role, row.layer, row.shape, parse_grid(grid), False, "kept")


@pytest.mark.parametrize(
    ("container", "grid", "said"),
    [
        (CompressedTensors(), "int4-g32-fz", "> hqq"),
        (CompressedTensors(), "nf4-b64", "> bitsandbytes"),
        (CompressedTensors(), "q4_k", "> gguf"),
        (CompressedTensors(), "fp8-e5m2-channel", "> bitmill"),
        (CompressedTensors(), "int8-tensor-sym", "whole tensor"),
        (Gptq(), "int4-g32-fz", "> hqq"),
        (AutoRound(), "int4-g32-asym", "-sym"),
        (AutoRound(), "int5-g32-sym", "2, 3, 4 or 8"),
        (Awq(), "int3-g32-asym", "> gptq"),
        (Awq(), "int4-g32-fz", "-asym"),
        (Awq(), "nvfp4", "> bitmill"),
        (Awq(), "int4-g256-asym", "128"),
        (Gptq(), "int5-g32-sym", "2, 3, 4 or 8"),
        (Gptq(), "mxfp4", "> bitmill"),
    ],
)
def test_refusals_say_where_to_go(container: Container, grid: str, said: str) -> None:
    assert said in str(container.refuses(parse_grid(grid), "q", (256, 256)))


def test_gptq_sides_are_multiples_of_32() -> None:
    assert "multiples of 32" in str(Gptq().refuses(parse_grid("int4-channel-sym-sf16"), "q", (48, 64)))


def edited(path: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {**load_file(path / "model.safetensors"), **changes}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return tensors


def reconfigured(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


def test_gptq_by_activation_order(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(Gptq(), source, "int4-g32-asym", tmp_path)
    quantized = out.quantized[WEIGHT]
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    index = (torch.arange(128) // 32)[order].to(torch.int32)
    edited(out.path, **{f"{NAME}.g_idx": index})
    again = open_path(out.path)
    assert again.stored(WEIGHT) is None
    scale, zero = (quantized.params[k][:, index.long()] for k in ("scale", "zero"))
    assert torch.equal(again.read(WEIGHT), (quantized.codes.float() - zero) * scale)
    edited(out.path, **{f"{NAME}.g_idx": index + 1})
    with pytest.raises(BadFile, match="outside the 4 groups"):
        open_path(out.path).read(WEIGHT)


def test_gptq_version_two_under_either_name(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(Gptq(), source, "int4-g32-sym", tmp_path)
    zeros = load_file(out.path / "model.safetensors")
    edited(out.path, **{k: torch.full_like(v, -0x77777778) for k, v in zeros.items() if k.endswith("qzeros")})
    for layout in ("gptq", "gptq_v2"):
        reconfigured(out.path, checkpoint_format=layout)
        assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())
    reconfigured(out.path, checkpoint_format="marlin")
    with pytest.raises(Refused, match="marlin"):
        open_path(out.path)


def test_w8a8_and_fp8_with_activations(source: SafetensorsFolder, tmp_path: Path) -> None:
    """llm-compressor's W8A8 keeps signed bytes, its FP8 bfloat16 scales; input scales are no weights."""
    out = written(CompressedTensors(), source, "int8-channel-sym", tmp_path / "int")
    tensors = load_file(out.path / "model.safetensors")
    for name, quantized in out.quantized.items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_packed" in tensors:
            del tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_shape"]
            tensors[name] = (quantized.codes.to(torch.int16) - 128).to(torch.int8)
            tensors[f"{module}.input_scale"] = torch.ones(1)
    save_file(tensors, out.path / "model.safetensors", {"format": "pt"})
    again = open_path(out.path)
    assert set(again.tensors) == set(out.quantized)
    assert all(torch.equal(again.read(n).float(), q.dense()) for n, q in out.quantized.items())
    fp8 = written(CompressedTensors(), source, "fp8-e4m3-tensor", tmp_path / "fp8")
    tensors = edited(fp8.path, **{f"{NAME}.weight_scale": torch.tensor([0.5]).bfloat16()})
    assert torch.equal(open_path(fp8.path).read(WEIGHT), tensors[WEIGHT].float() * 0.5)


def test_settings_of_awq(source: SafetensorsFolder, tmp_path: Path) -> None:
    found = settings_of(written(Awq(), source, "int4-channel-asym", tmp_path, o="bf16").path)
    kept = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    assert found == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "only 4 bits"),
        ({"version": "gemv"}, "'gemv'"),
        ({"group_size": 64}, "groups"),
        ({"group_size": 0}, "no number of inputs"),
        ({"group_size": "32"}, "no number of inputs"),
    ],
)
def test_settings_of_awq_that_lie(
    source: SafetensorsFolder, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    out = written(Awq(), source, "int4-g32-asym", tmp_path)
    reconfigured(out.path, **changes)
    with pytest.raises((BadFile, Refused), match=said):
        open_path(out.path)


def test_settings_of_auto_round(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(AutoRound(), source, "int4-g32-sym", tmp_path, down="int8-channel-sym", o="bf16")
    found = settings_of(out.path)
    wanted = {"bits": 4, "group_size": 32, "sym": True, "packing_format": "auto_round:auto_gptq"}
    assert {key: found[key] for key in wanted} == wanted
    extra = found["extra_config"]
    assert extra["model.layers.2.mlp.down_proj"]["group_size"] == -1 and len(extra) == 6
    assert extra["model.layers.0.self_attn.o_proj"]["bits"] == 16
    again = open_path(out.path)
    assert all(torch.equal(again.read(n).float(), q.dense()) for n, q in out.quantized.items())
    for changes, said in (
        ({"packing_format": "auto_round:exllamav2"}, "packed as"),
        ({"packing_format": ["auto_round"]}, "packed as"),
        ({"packing_format": "auto_round:auto_awq"}, "words|must be|groups"),
        ({"bits": 5}, "5 bits"),
        ({"data_type": "mx_fp"}, "packed as"),
        ({"packing_format": "auto_round", "model_free": True, "sym": False}, "model-free"),
        ({"extra_config": {}, "packing_format": "auto_round:auto_gptq"}, "words|groups"),
    ):
        before = (out.path / "config.json").read_text()
        reconfigured(out.path, **changes)
        with pytest.raises((BadFile, Refused), match=said):
            open_path(out.path)
        (out.path / "config.json").write_text(before)


def test_version_two_is_written_and_said(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(Gptq(version=2), source, "int4-g32-asym", tmp_path)
    assert settings_of(out.path)["checkpoint_format"] == "gptq_v2"
    again = open_path(out.path)
    for name, quantized in out.quantized.items():
        assert torch.equal(again.read(name).float(), quantized.dense())


def test_the_same_integers_in_every_folder(source: SafetensorsFolder, tmp_path: Path) -> None:
    """From one folder into another and a third: the same codes, scales and zero points."""
    first = open_path(written(Awq(), source, "int4-g32-asym", tmp_path / "awq").path)
    for container in (Gptq(version=2), CompressedTensors(), Awq()):
        (tmp_path / type(container).__name__).mkdir()
        for name in first.tensors:
            found = first.stored(name)
            if found is None:
                continue
            grid = container.adapt(found.grid, "f16")
            assert isinstance(grid, Integer) and (grid.zero, grid.scale, grid.zero_floor) == (
                "asym",
                "f16",
                0,
            )
            row = Row(name, "up", 0, found.shape, grid, True, "relabelled")
            parts = container.pack(row, found, first)
            assert {k: len(v) for k, v in parts.items()} == dict(container.slots(row, first))


@pytest.mark.parametrize(
    "container", [CompressedTensors(), Gptq(), Gptq(version=2), Awq(), Bitmill()], ids=repr
)
def test_parts_that_do_not_fit(container: Container, source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(container, source, "int4-g32-asym", tmp_path)
    path = out.path / "model.safetensors"
    tensors, before = load_file(path), path.read_bytes()
    metadata = json.loads(before[8 : 8 + int.from_bytes(before[:8], "little")])["__metadata__"]
    mine = [name for name in tensors if name.startswith(f"{NAME}.")]
    assert len(mine) >= 3
    for name in mine:
        if name.endswith("g_idx"):
            continue
        for wrong in ({}, {name: tensors[name][:-1]}, {name: tensors[name].to(torch.int16)}):
            others = {k: v for k, v in tensors.items() if k != name}
            save_file({k: v.contiguous() for k, v in {**others, **wrong}.items()}, path, metadata)
            with pytest.raises((BadFile, Refused)):
                open_path(out.path).read(WEIGHT)
    path.write_bytes(before)
    assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": {}},
        {"config_groups": {"g": {"targets": "Linear", "weights": {}}}},
        {"config_groups": {"g": {"targets": ["re:(("], "weights": {"num_bits": 4}}}},
        {"config_groups": {"g": {"targets": ["other"], "weights": {"num_bits": 4}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 9, "type": "int"}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": "4", "type": ["int"]}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 0}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 10**30}}}},
        {"transform_config": {"config_groups": {"u": {}}}},
    ],
    ids=str,
)
def test_settings_that_lie(source: SafetensorsFolder, tmp_path: Path, changes: dict[str, Any]) -> None:
    out = written(CompressedTensors(), source, "int4-g32-asym", tmp_path)
    reconfigured(out.path, **changes)
    with pytest.raises((BadFile, Refused)):
        open_path(out.path).read(WEIGHT)


@pytest.mark.parametrize(
    "entry",
    [
        "int4",
        ["int4-g32-asym", 128],
        ["nope", 256, 128],
        ["int4-g32-asym", 256, 1 << 40],
        ["f32", 256, 128],
        ["int4-g32-asym", True, 128],
        ["int4-g32-asym", 256, 120],
    ],
)
def test_own_map_of_weights_that_lies(source: SafetensorsFolder, tmp_path: Path, entry: Any) -> None:
    out = written(Bitmill(), source, "int4-g32-asym", tmp_path)
    path = out.path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    weights = json.loads(header["__metadata__"]["bitmill.weights"])
    header["__metadata__"]["bitmill.weights"] = json.dumps({**weights, WEIGHT: entry})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(BadFile):
        open_path(out.path)


def test_tied_and_own_heads(source: SafetensorsFolder, tmp_path: Path) -> None:
    """A head of its own, when the plan gives one to a tied model, unties the configuration."""
    embed = source.tensors["model.embed_tokens.weight"]
    rows = rows_of(CompressedTensors(), source, "bf16", parse_grid("int4-g32-sym-sbf16"))
    config = json.loads(CompressedTensors().files(rows, source, {})[0].head)
    assert config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    head = Row("lm_head.weight", "head", None, embed.shape, parse_grid("bf16"), False, "own")
    config = json.loads(CompressedTensors().files([*rows, head], source, {})[0].head)
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_nothing_quantized_is_a_plain_folder(source: SafetensorsFolder, tmp_path: Path) -> None:
    for container in (CompressedTensors(), Gptq()):
        out = written(container, source, "bf16", tmp_path / type(container).__name__)
        again = open_path(out.path)
        assert isinstance(again, SafetensorsFolder)
        assert all(torch.equal(again.read(n), source.read(n)) for n in source.tensors)


def test_scales_that_nothing_here_reads_are_named(tmp_path: Path) -> None:
    """A cache's scales change what the folder's own runtime computes: whoever goes on from it is told."""
    folder = tmp_path / "folder"
    source = SafetensorsFolder(make_model(tmp_path / "model"))
    quantize(source, "nearest : fp8-e4m3-channel > compressed-tensors", folder)
    assert not any("left out" in text for text in plan(parse("hf-f32"), open_source(str(folder))).remarks)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(folder))
    assert any(
        "1 stored scales" in text and "k_scale" in text for text in plan(parse("hf-f32"), source).remarks
    )


def test_an_option_for_a_role_that_no_tensor_has_is_remarked(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model")))
    line = "nearest : int4-g32-sym, head=int8-channel-sym, keep=router+v > compressed-tensors"
    said = plan(parse(line), source).remarks
    assert any("keep=router is for no tensor" in text for text in said)
    assert any("head=int8-channel-sym is for no tensor" in text for text in said)
    assert not any("keep=v" in text for text in said)
    assert not any("no tensor" in text for text in plan(parse("mlx-4bit"), source).remarks)
