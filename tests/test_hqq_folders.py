"""HQQ folders byte by byte, groups down the outputs, and parts that lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers._hqq_read import PACKINGS, pack_parts, unpack_parts
from bitmill.containers.hqq import Hqq
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Problem
from bitmill.solvers.hqq import Hqq as Solver
from bitmill.source import open_path
from tests.tiny import EXPERTS, make_model
from tests.written import Written, rows_of, write

NAME = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NAME}.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    folder = tmp_path_factory.mktemp("model")
    return SafetensorsFolder(make_model(folder, "llama", tied=True, dtype="bfloat16"))


def written(source: SafetensorsFolder, grid: str, out: Path, **other: str) -> Written:
    chosen = {role: Hqq().adapt(parse_grid(text), "bf16") for role, text in other.items()}
    grids = Hqq().adapt(parse_grid(grid), "bf16")
    return write(Hqq(), source, rows_of(Hqq(), source, "bf16", grids, chosen), out)


def tensors_of(out: Written) -> dict[str, Tensor]:
    return load_file(out.path / "model.safetensors")


def save(out: Written, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, out.path / "model.safetensors")


def test_parts_stand_beside_each_other_in_a_word() -> None:
    """Rows of the first half are in the high bits: row 0 beside row N/2, not beside row 1."""
    assert pack_parts(torch.tensor([[1], [2], [3], [4]]), PACKINGS[4]).tolist() == [[0x13], [0x24]]
    assert pack_parts(torch.tensor([[3], [2], [1], [0]]), PACKINGS[2]).tolist() == [[0b11100100]]
    assert pack_parts(torch.tensor([[1], *[[0]] * 6, [1]]), PACKINGS[1]).tolist() == [[0b10000001]]
    ten = torch.arange(12)[:, None] % 8
    words = pack_parts(ten, PACKINGS[3])  # twelve rows are two words, of which the last parts are empty
    assert words.dtype is torch.int32 and words.shape == (2, 1)
    assert int(words[0]) == sum(v << (27 - 3 * k) for k, v in enumerate([0, 2, 4, 6, 0, 2]))
    assert torch.equal(unpack_parts(words, PACKINGS[3], 12), ten.to(torch.uint8))
    assert int(pack_parts(torch.full((10, 1), 7), PACKINGS[3])) == 2**30 - 1


@pytest.mark.parametrize("bits", PACKINGS)
def test_packing_there_and_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (80, 3), generator=torch.Generator().manual_seed(bits))
    packing = PACKINGS[bits]
    assert torch.equal(unpack_parts(pack_parts(codes, packing), packing, 80).long(), codes)


def test_a_group_down_the_outputs_has_every_nth_row() -> None:
    w = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    quantized = parse_grid("int4-r8-fz").round(w)
    scale, zero = quantized.params["scale"], quantized.params["zero"]
    assert scale.shape == zero.shape == (3, 5)
    for row in range(24):
        wanted = (quantized.codes[row].float() - zero[row % 3]) * scale[row % 3]
        assert torch.equal(quantized.dense()[row], wanted)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("solver", ["nearest", "hqq"])
def test_both_axes_are_one_method(bits: int, solver: str) -> None:
    """Groups down the outputs are rows of the transposed groups: every number is the same."""
    w = torch.randn(64, 48, generator=torch.Generator().manual_seed(bits))
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.02] *= 6
    turned = w.reshape(16, -1).T.contiguous()
    down, along = parse_grid(f"int{bits}-r16-fz"), parse_grid(f"int{bits}-channel-fz")

    def place(weight: Tensor, grid: str) -> Tensor:
        chosen = parse_grid(grid)
        if solver == "nearest":
            return chosen.round(weight).dense()
        return Solver().solve([Problem("w", "q", weight)], [chosen])[0].quantized.dense()

    assert torch.equal(place(w, str(down)).reshape(16, -1).T, place(turned, str(along)))
    u = torch.rand(64, 48, generator=torch.Generator().manual_seed(2))
    weighted = along.round(turned, u.reshape(16, -1).T.contiguous()).dense()
    assert torch.equal(down.round(w, u).dense().reshape(16, -1).T, weighted)


def test_what_stands_beside_a_weight(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "int3-r32-fz", tmp_path, o="bf16")
    mine = {k.removeprefix(f"{NAME}."): v for k, v in tensors_of(out).items() if k.startswith(f"{NAME}.")}
    assert mine["W_q"].shape == (4, 256 * 128 // 32) and mine["scale"].shape == (1, 1024)
    assert [int(mine[k]) for k in ("nbits", "axis", "group_size")] == [3, 0, 32]
    assert mine["shape"].tolist() == [256, 128]
    assert bytes(mine["packing"].tolist()) == b"3bit_32"
    assert bytes(mine["compute_dtype"].tolist()) == b"torch.bfloat16"
    settings = json.loads((out.path / "config.json").read_text())["quantization_config"]
    assert settings["quant_config"]["weight_quant_params"]["axis"] == 0
    assert settings["skip_modules"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)] + ["lm_head"]


@pytest.mark.parametrize(
    ("grid", "shape", "said"),
    [
        ("int4-g64-asym", (256, 256), "-fz"),
        ("int4-g64-sym", (256, 256), "-fz"),
        ("int7-g64-fz", (256, 256), "not 7"),
        ("nf4-b64", (256, 256), "> bitmill"),
        ("int4-g12-fz", (256, 240), "multiples of 8"),
        ("int4-channel-fz", (255, 256), "multiple of the 2"),
        ("int4-r64-fz", (250, 256), "multiple of the group"),
    ],
)
def test_refusals(grid: str, shape: tuple[int, int], said: str) -> None:
    assert said in str(Hqq().refuses(parse_grid(grid), "q", shape))


def test_experts_are_refused(tmp_path: Path) -> None:
    model = SafetensorsFolder(make_model(tmp_path / "model", next(iter(EXPERTS))))
    with pytest.raises(Refused, match="experts"):
        written(model, "int4-g64-fz", tmp_path)


@pytest.mark.parametrize("grid", ["int4-g32-fz", "int3-r32-fz"])
def test_parts_that_do_not_fit(source: SafetensorsFolder, tmp_path: Path, grid: str) -> None:
    out = written(source, grid, tmp_path)
    tensors = tensors_of(out)
    for part in ("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing"):
        name = f"{NAME}.{part}"
        for wrong in ({}, {name: tensors[name].reshape(-1)[1:]}, {name: tensors[name].double() + 0.5}):
            save(out, {**{k: v for k, v in tensors.items() if k != name}, **wrong})
            with pytest.raises((BadFile, Refused)):
                open_path(out.path).read(WEIGHT)
    save(out, tensors)
    assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("nbits", 7),
        ("nbits", 2),
        ("nbits", -4),
        ("axis", 2),
        ("axis", 0),
        ("group_size", 0),
        ("group_size", -32),
        ("group_size", 1 << 40),
        ("group_size", 48),
        ("shape", [256, 1 << 40]),
        ("shape", [256, 0]),
        ("shape", [128, 128]),
        ("shape", [256]),
        ("quant_scale", 1),
        ("quant_zero", 1),
        ("channel_wise", 0),
        ("packing", list(b"2bit_u8")),
        ("packing", list(b"\xff" * 7)),
        ("packing", list(b"x" * 1000)),
    ],
)
def test_parts_that_lie(source: SafetensorsFolder, tmp_path: Path, part: str, value: int | list[int]) -> None:
    out = written(source, "int4-g32-fz", tmp_path)
    dtype = torch.uint8 if part == "packing" else torch.int64
    save(out, {**tensors_of(out), f"{NAME}.{part}": torch.tensor(value, dtype=dtype)})
    with pytest.raises((BadFile, Refused)):
        open_path(out.path).read(WEIGHT)


def test_words_stored_as_numbers(source: SafetensorsFolder, tmp_path: Path) -> None:
    """``view_as_float``: the same bytes under another type."""
    out = written(source, "int4-g32-fz", tmp_path)
    tensors = tensors_of(out)
    save(out, {**tensors, f"{NAME}.W_q": tensors[f"{NAME}.W_q"].view(torch.bfloat16)})
    assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())


def test_five_bits_in_a_byte_that_holds_more(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "int5-g32-fz", tmp_path)
    tensors = tensors_of(out)
    codes = tensors[f"{NAME}.W_q"]
    codes[0, 0] = 200
    save(out, tensors)
    again = open_path(out.path)
    assert again.stored(WEIGHT) is None and again.read(WEIGHT).isfinite().all()


def test_a_folder_that_says_nothing(source: SafetensorsFolder, tmp_path: Path) -> None:
    """hqq itself writes no ``quantization_config``."""
    out = written(source, "int4-g32-fz", tmp_path)
    config = json.loads((out.path / "config.json").read_text())
    del config["quantization_config"]
    (out.path / "config.json").write_text(json.dumps(config))
    assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())
