"""Conversions: the same values in another container or none, a loss never unasked, and safe when killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import bitmill
from bitmill import mill
from bitmill.conversion import writable
from bitmill.core.errors import BadRecipe, Interrupted, Refused
from bitmill.core.registry import find_grid, parse_grid
from bitmill.relabel import equivalents, relabelled, same_values
from bitmill.source import open_source
from tests.test_kill import CONTEXT, content
from tests.tiny import make_model

PAIRS = [
    ("int4-g64-asym", "int4-g64-asym-sf16-z1"),
    ("int4-g64-asym-z1", "int4-g64-asym"),
    ("int4-g128-sym", "int4-g128-asym"),
    ("int4-g128-sym", "int4-g32-sym"),
    ("int4-channel-sym", "int4-g64-sym"),
    ("int4-tensor-asym", "int4-channel-asym"),
    ("int3-g64-asym", "int4-g64-asym"),
    ("int4-g64-asym", "int4-g64-fz"),
    ("int4-g64-sym", "q4_0"),
    ("int4-g64-asym", "q5_0"),
    ("int5-g32-sym", "q5_0"),
    ("int4-g64-asym", "q8_0"),
    ("q4_0", "int4-g32-sym"),
    ("q4_0", "q8_0"),
    ("q8_0", "int8-g32-sym"),
    ("q4_1", "q5_1"),
    ("q4_1", "int4-g32-bias"),
    ("int4-g64-bias", "q4_1"),
    ("int4-g64-sym", "int4-g64-bias"),
    ("int4-g64-asym", "int4-g64-bias-sf32"),
    ("int4-g64-asym-sbf16", "int4-g32-bias-sf32"),
    ("tq1_0", "tq2_0"),
    ("tq2_0", "int2-g256-sym"),
    ("mxfp4", "mxfp4-floor"),
    ("mxfp4", "nvfp4"),
    ("nvfp4-flat", "nvfp4"),
    ("fp8-e4m3-tensor", "fp8-e4m3-channel"),
    ("nf4-b64-dq", "nf4-b64"),
]
NEVER = [
    ("int4-g64-asym", "int4-g64-asym-sbf16"),
    ("int4-g64-asym", "int4-g64-sym"),
    ("int4-g64-asym", "int4-g128-asym"),
    ("int4-g64-asym", "q4_0"),
    ("int4-g64-fz", "int4-g64-asym"),
    ("int4-g64-fz", "q5_0"),
    ("q5_1", "q4_1"),
    ("int4-g64-bias", "int4-g64-asym"),
    ("int5-g32-bias", "q4_1"),
    ("int4-g64-asym", "int4-g64-bias"),
    ("q4_k", "q5_k"),
    ("nvfp4", "mxfp4"),
    ("nf4-b64", "fp4-b64"),
]


def weight(rows: int = 48, columns: int = 256) -> torch.Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_relabelled_weights_decode_to_the_same_numbers(one: str, other: str) -> None:
    stored = parse_grid(one).round(weight())
    made = relabelled(stored, parse_grid(other))
    assert made is not None and made.grid == parse_grid(other)
    assert torch.equal(made.dense(), stored.dense()) and same_values(made, stored)


@pytest.mark.parametrize(("one", "other"), NEVER)
def test_what_is_not_the_same_is_not_relabelled(one: str, other: str) -> None:
    assert relabelled(parse_grid(one).round(weight()), parse_grid(other)) is None


def test_every_equivalent_that_holds_a_weight_holds_its_values() -> None:
    tried = 0
    for name in dict.fromkeys([*(p[0] for p in PAIRS), *(p[0] for p in NEVER)]):
        stored = parse_grid(name).round(weight(8))
        for grid in equivalents(stored.grid):
            made = relabelled(stored, grid)
            tried += made is not None
            assert made is None or torch.equal(made.dense(), stored.dense()), f"{name} as {grid}"
            assert find_grid(str(grid)) == grid
    assert tried > 100


def test_a_zero_point_of_0_moves_where_the_top_code_is_free_and_only_there() -> None:
    grid = parse_grid("int4-g64-asym")
    stored = grid.round(weight().abs())
    assert float(stored.params["zero"].max()) == 0
    assert relabelled(stored, parse_grid("int4-g64-asym-z1")) is None, "codes 0 … 15 are all in use"
    spare = parse_grid("int3-g64-asym").round(weight().abs())
    assert relabelled(spare, parse_grid("int4-g64-asym-z1")) is not None


def test_a_difference_in_one_value_is_seen() -> None:
    stored = parse_grid("int4-g64-sym").round(weight())
    other = relabelled(stored, parse_grid("q4_0"))
    assert other is not None
    other.codes[47, 255] ^= 1
    assert not same_values(stored, other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in half precision, quantized several ways."""
    here = tmp_path_factory.mktemp("sources")
    model = make_model(here / "model", dtype="float16")
    for name, recipe in {
        "gptq": "nearest : int4-g32-asym > gptq",
        "gptq-sym": "nearest : int4-g32-sym > gptq",
        "awq": "nearest : int4-g32-asym > awq",
        "mlx": "nearest : int4-g32-bias > mlx",
        "ct-sym": "nearest : int4-g32-sym > compressed-tensors",
        "q4.gguf": "nearest : q4_0, embed=f16 > gguf",
        "k.gguf": "nearest : q4_0, embed=f16, down=q6_k > gguf",
    }.items():
        mill.quantize(str(model), recipe, here / name)
    return here


EXACT = [
    ("gptq", "compressed-tensors", "int4-g32-asym-sf16"),
    ("gptq-sym", "compressed-tensors", "int4-g32-sym-sf16"),
    ("ct-sym", "gptq", "int4-g32-sym-sf16"),
    ("gptq", "awq", "int4-g32-asym-sf16"),
    ("gptq-sym", "awq", "int4-g32-sym-sf16"),
    ("awq", "gptq", "int4-g32-asym-sf16-z1"),
    ("awq", "compressed-tensors", "int4-g32-asym-sf16"),
    ("awq", "gguf", "q5_0"),
    ("ct-sym", "awq", "int4-g32-sym-sf16"),
    ("gptq-sym", "mlx", "int4-g32-sym-sf16"),
    ("mlx", "gguf", "q4_1"),
    ("q4.gguf", "mlx", "int4-g32-sym-sf16"),
    ("gptq", "bitmill", "int4-g32-asym-sf16-z1"),
    ("gptq", "gguf", "q5_0"),
    ("gptq-sym", "gguf", "q4_0"),
    ("q4.gguf", "gptq", "int4-g32-sym-sf16"),
    ("q4.gguf", "compressed-tensors", "int4-g32-sym-sf16"),
    ("q4.gguf", "gguf", "q4_0"),
    ("k.gguf", "gguf", "q4_0"),
    ("gptq", "safetensors", "f32"),
]


@pytest.mark.parametrize(("source", "container", "grid"), EXACT)
def test_every_value_is_the_same_in_the_other_container(
    source: str, container: str, grid: str, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("out.gguf" if container == "gguf" else "out")
    report = bitmill.convert(str(folder / source), container, out)
    before, after = open_source(str(folder / source)), open_source(str(out))
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert torch.equal(before.read(name).float(), after.read(name).float()), name
    rows = {row["name"]: row["grid"] for row in report.plan["rows"]}
    assert rows["model.layers.1.self_attn.q_proj.weight"] == grid
    assert not report.tensors and not report.notes
    written = sum(p.stat().st_size for p in (out.rglob("*") if out.is_dir() else [out]) if p.is_file())
    sidecar = (out / "bitmill-report.json").stat().st_size if out.is_dir() else 0
    assert written - sidecar == report.bytes_


SOURCES = {
    "gptq": "nearest : int4-g64-asym > gptq",
    "rows-of-eight-bits": "nearest : int8-channel-sym > compressed-tensors",
    "fp8": "nearest : fp8-e4m3-b128 > compressed-tensors",
    "mxfp4.gguf": "nearest : mxfp4, embed=q6_k > gguf",
    "q4_0.gguf": "nearest : q4_0 > gguf",
    "nf4": "nearest : nf4-b64-dq > bitsandbytes",
    "torchao": "nearest : int4-g64-asym > torchao",
    "mlx": "nearest : int4-g64-asym > mlx",
    "hqq": "nearest : int4-g64-fz > hqq",
}


@pytest.mark.parametrize("name", SOURCES)
def test_from_anywhere_to_anywhere_all_values_are_kept_or_it_is_refused(name: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "head_dim": 64}
    model = make_model(tmp_path / "model", dtype="bfloat16", **sizes)
    mill.quantize(str(model), SOURCES[name], tmp_path / name)
    before, exact = open_source(str(tmp_path / name)), []
    for container in writable():
        out = tmp_path / "out" / f"{container}{'.gguf' if container == 'gguf' else ''}"
        try:
            bitmill.convert(before, container, out)
        except Refused as refusal:
            assert "--requantize" in str(refusal) and not out.exists()
            continue
        after = open_source(str(out))
        for tensor in before.tensors:
            assert torch.equal(before.read(tensor).float(), after.read(tensor).float()), (container, tensor)
        exact.append(container)
    home = SOURCES[name].rpartition("> ")[2].replace("-", "_")
    assert {home, "bitmill", "safetensors"} <= set(exact)


@pytest.mark.parametrize("one", ["gptq-sym", "gptq"])
def test_there_and_back_is_the_same_codes_and_scales(one: str, folder: Path, tmp_path: Path) -> None:
    bitmill.convert(str(folder / one), "compressed-tensors", tmp_path / "there")
    bitmill.convert(str(tmp_path / "there"), "awq", tmp_path / "on")
    bitmill.convert(str(tmp_path / "on"), "gptq", tmp_path / "back")
    before, after = open_source(str(folder / one)), open_source(str(tmp_path / "back"))
    for name in before.tensors:
        first, last = before.stored(name), after.stored(name)
        assert (first is None) == (last is None)
        if first is not None and last is not None:
            assert first.grid == last.grid and torch.equal(first.codes, last.codes)
            assert all(torch.equal(first.params[key], last.params[key]) for key in first.params)


def test_a_loss_is_refused_named_and_priced_where_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Refused, match=r"(?s)3 of 21 quantized weights: q6_k.*--requantize") as said:
        bitmill.convert(str(folder / "k.gguf"), "compressed-tensors", out)
    assert said.value.where == "model.layers.0.mlp.down_proj.weight" and not list(tmp_path.iterdir())
    report = bitmill.convert(str(folder / "k.gguf"), "compressed-tensors", out, requantize=True)
    before, after = open_source(str(folder / "k.gguf")), open_source(str(out))
    assert set(report.tensors) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    total = [0.0, 0.0]
    for name in before.tensors:
        one, other = before.read(name).double(), after.read(name).double()
        error, power = float((one - other).square().sum()), float(one.square().sum())
        if name in report.tensors:
            assert report.tensors[name]["squared"] == pytest.approx(error / power, rel=1e-6)
            total = [total[0] + error, total[1] + power]
        else:
            assert error == 0, name
    (note,) = report.notes
    assert note.kind == "requantized" and note.value == pytest.approx(total[0] / total[1], rel=1e-6)
    assert "on top of what the source had lost" in note.text
    assert note.value < 1e-4, "the closest grid has no fewer bits"


def test_named_grids_are_exact_where_they_can_be_and_rounded_where_not(folder: Path, tmp_path: Path) -> None:
    report = bitmill.convert(
        str(folder / "k.gguf"), "nearest : int4-g32-sym > compressed-tensors", tmp_path / "out"
    )
    assert {n.rsplit(".", 2)[1] for n in report.tensors} == {"down_proj"}
    assert next(r["why"] for r in report.plan["rows"] if r["role"] == "q") == "the values of q4_0"
    with pytest.raises(BadRecipe, match="quantize"):
        bitmill.convert(str(folder / "k.gguf"), "gptq : int4-g32-sym > gptq", tmp_path / "no")
    with pytest.raises(BadRecipe, match="no container or recipe"):
        bitmill.convert(str(folder / "k.gguf"), "gptqq", tmp_path / "no")


def test_scales_of_another_precision_are_not_rounded_unseen(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype="bfloat16")
    mill.quantize(str(model), "nearest : int4-g32-sym > gptq", tmp_path / "gptq")  # half-precision scales
    report = bitmill.convert(str(tmp_path / "gptq"), "compressed-tensors", tmp_path / "out")
    assert report.plan["dtype"] == "f32" and "bf16 would change 21 tensors" in report.plan["remarks"][0]
    with pytest.raises(Refused, match="21 of 21"):
        bitmill.convert(str(tmp_path / "gptq"), "compressed-tensors", tmp_path / "no", dtype="bf16")


def test_columns_that_are_out_of_order_are_no_grid_and_said_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(folder / "gptq"))
    monkeypatch.setattr(type(source), "stored", lambda self, name: None)
    with pytest.raises(Refused, match="no grid describes"):
        bitmill.convert(source, "compressed-tensors", tmp_path / "out")


def test_a_dense_model_is_not_converted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nothing in this model is quantized"):
        bitmill.convert(str(folder / "model"), "gguf", tmp_path / "out.gguf")


def test_nothing_is_overwritten_and_a_stop_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bitmill.convert(str(folder / "gptq"), "compressed-tensors", tmp_path / "whole")

    def stop(where: str) -> None:
        if where == "block 1: journaled":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="same command"):
        bitmill.convert(str(folder / "gptq"), "compressed-tensors", out, boundary=stop)
    assert not out.exists()
    report = bitmill.convert(str(folder / "gptq"), "compressed-tensors", out)
    assert report.resumed == 3 and content(out) == content(tmp_path / "whole")
    again = bitmill.convert(str(folder / "gptq"), "compressed-tensors", out)
    assert [note.kind for note in again.notes] == ["present"]
    with pytest.raises(Refused, match="exists"):
        bitmill.convert(str(folder / "gptq"), "bitmill", out)


def run(source: str, to: str, out: str, kill_at: int) -> None:
    """Convert; SIGKILL ourselves at the ``kill_at``-th boundary (never, when negative)."""
    torch.set_num_threads(1)
    passed = 0

    def boundary(_: str) -> None:
        nonlocal passed
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    bitmill.convert(source, to, out, requantize=True, boundary=boundary)


def test_killed_and_gone_on_from_it_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    """Killed again and again, each time a few boundaries further, until nothing is left to be killed at."""
    words, out = (str(folder / "k.gguf"), "compressed-tensors"), tmp_path / "out"
    bitmill.convert(*words, tmp_path / "whole", requantize=True)
    for at in (1, 4, 5, 3, 2, -1):
        process = CONTEXT.Process(target=run, args=(*words, str(out), at))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if at >= 0 else 0)
        assert at < 0 or not out.exists() or content(out) == content(tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
