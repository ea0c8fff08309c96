"""The studio's answers: what it says of rows, numbers, caches and files is what the grids themselves say."""

from __future__ import annotations

import json
import math
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import bitmill
from bitmill.core.errors import Refused, Unsolvable
from bitmill.core.registry import grid_families, parse_grid
from bitmill.core.types import Quantized
from bitmill.numerics import hadamard
from bitmill.source import open_source
from bitmill.studio import digits, line
from bitmill.studio.asked import MOST_BYTES, Asked
from bitmill.studio.desk import OUTSIDE, Desk
from bitmill.studio.made import made, sections
from bitmill.studio.opened import opened
from tests.test_pages import sound
from tests.test_report import EVIL

DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def desk(tiny_llama: Path) -> Desk:
    return Desk(open_source(str(tiny_llama)))


@pytest.fixture(scope="module")
def file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as Bitmill makes it, with its report beside it."""
    out = tmp_path_factory.mktemp("made") / "small.gguf"
    bitmill.quantize(str(tiny_llama), "Q4_0", out)
    return out


def asked(fields: dict[str, Any], known: tuple[str, ...] = line.FIELDS) -> Asked:
    return Asked.read(json.dumps(fields).encode(), known)


def relative(w: torch.Tensor, ours: torch.Tensor) -> float:
    return float((ours - w).norm() / w.norm())


def test_names_and_rows_are_those_of_the_file(desk: Desk) -> None:
    assert desk.blocks == ["0", "1", "2", OUTSIDE]
    found = desk.matrices("1", "down")
    assert found["matrices"] == [{"name": DOWN, "shape": [128, 256]}] and found["all"] == 1
    whole = desk.checkpoint.read(DOWN).float()
    tile = desk.tile(DOWN, 37, 16)
    assert tile.first == 32 and torch.equal(tile.values, whole[32:48])
    assert desk.tile(DOWN, 40, 16) is tile, "rows that were read are kept"
    last = desk.tile(DOWN, 127, 128)
    assert last.first == 0 and torch.equal(last.values, whole)


def test_rows_of_a_gguf_file_are_decoded_alone(file: Path, smollm2: Path) -> None:
    for path, names in ((file, (DOWN, QUERY)), (smollm2, ("model.layers.3.self_attn.k_proj.weight",))):
        checkpoint = open_source(str(path))
        for name in names:
            whole = checkpoint.read(name).float()
            for start, rows in ((0, 16), (48, 16), (16, 1)):
                tile = Desk(checkpoint).tile(name, start, rows)
                assert torch.equal(tile.values, whole[start : start + rows]), (path.name, name, start)


def test_rows_of_packed_folders_are_their_values(tiny_llama: Path, tmp_path: Path) -> None:
    bitmill.quantize(str(tiny_llama), "nearest : int8-channel-sym > compressed-tensors", tmp_path / "out")
    desk = Desk(open_source(str(tmp_path / "out")))
    tile = desk.tile(DOWN, 20, 16)
    assert torch.equal(tile.values, desk.checkpoint.read(DOWN).float()[16:32])
    assert desk.kept(DOWN) == "quantized" and desk.kept("model.embed_tokens.weight") == ""
    assert line.on_grid(desk, asked({"tensor": DOWN, "grid": "int8-channel-sym"}))["lost"]["relative"] < 0.01


@pytest.mark.parametrize("grid", [str(g) for family in grid_families() for g in family.examples()])
def test_every_grid_says_what_rounding_gives(desk: Desk, grid: str) -> None:
    ours = parse_grid(grid)
    fields = {"tensor": DOWN, "row": 20, "column": 64, "grid": grid}
    w = desk.checkpoint.read(DOWN).float()[16:32]
    why = ours.refuses((128, 256)) or ours.refuses((16, 256))
    if why is not None:
        with pytest.raises(Refused, match=why.split()[0]):
            line.on_grid(desk, asked(fields))
        return
    found, direct = line.on_grid(desk, asked(fields)), ours.round(w)
    dense = direct.dense()
    assert found["grid"] == str(ours) and found["rows"] == [16, 31] and found["row"] == 20
    assert found["bits"] == ours.storage_bits((128, 256)) / (128 * 256)
    assert found["lost"]["relative"] == pytest.approx(relative(w, dense), rel=1e-4, abs=1e-9)
    assert found["lost"]["rmse"] == pytest.approx(
        float((dense - w).square().mean().sqrt()), rel=1e-4, abs=1e-12
    )
    assert found["lost"]["worst"] == pytest.approx(float((dense - w).abs().max()), rel=1e-4, abs=1e-12)
    block = found["block"]
    assert block["before"] == pytest.approx(w[4, 64:96].tolist(), rel=1e-4)
    assert block["after"] == pytest.approx(dense[4, 64:96].tolist(), rel=1e-4, abs=1e-9)
    if block["codes"]:
        assert block["codes"] == direct.codes[4, 64:96].tolist()
    for value in block["after"][: block["alike"]]:
        assert not block["points"] or min(abs(value - p) for p in block["points"]) < 1e-4


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30, 3e4])
def test_rows_of_one_number_break_nothing(tiny_llama: Path, fill: float) -> None:
    desk = Desk(open_source(str(tiny_llama)))
    desk.tile(DOWN, 0, 16).values.fill_(fill)
    for outlier in (0, 200):
        json.dumps(line.compare(desk, asked({"tensor": DOWN, "outlier": outlier})), allow_nan=False)
    for grid in ("int4-g64-asym", "nvfp4", "mxfp4", "q4_k", "iq2_s", "fp8-e4m3-b128", "nf4-b64-dq"):
        for outlier in (0, 200):
            fields = {"tensor": DOWN, "grid": grid, "outlier": outlier, "at": 9}
            with suppress(Unsolvable):  # a scale beyond half precision is told, as in a file
                json.dumps(line.on_grid(desk, asked(fields)), allow_nan=False)


def test_an_outlier_widens_the_grid_of_its_group_alone(desk: Desk) -> None:
    at = {"tensor": DOWN, "row": 3, "column": 0, "at": 5, "grid": "int4-g32-sym"}
    calm, wild = (line.on_grid(desk, asked({**at, "outlier": size})) for size in (0, 40))
    rms = float(desk.checkpoint.read(DOWN).float()[3].square().mean().sqrt())
    assert wild["block"]["before"][5] == pytest.approx(40 * rms, rel=1e-4)
    assert calm["lost"]["others"] is None and wild["lost"]["others"] > calm["lost"]["relative"]
    assert max(wild["block"]["points"]) > 4 * max(calm["block"]["points"])
    groups = {one["value"]: one["error"] for one in wild["beside"]["group"]}
    assert groups["16"] < groups["32"] < groups["64"] < groups["0"], "smaller groups keep it to themselves"
    bits = [one["error"] for one in wild["beside"]["bits"]]
    assert bits == sorted(bits, reverse=True) and len(bits) == 7


def test_a_rotation_spreads_the_outlier(desk: Desk) -> None:
    at = {"tensor": DOWN, "row": 3, "at": 5, "grid": "int4-channel-sym", "outlier": 60}
    plain, turned = (line.on_grid(desk, asked({**at, "turn": turn})) for turn in (False, True))
    w = desk.checkpoint.read(DOWN).float()[:16].clone()
    w[3, 5] = 60 * float(w[3].square().mean().sqrt())
    behind = hadamard.apply(w, 256)
    back = hadamard.apply(parse_grid("int4-channel-sym").round(behind).dense(), 256, transposed=True)
    assert turned["order"] == 256 and turned["lost"]["relative"] == pytest.approx(relative(w, back), rel=1e-3)
    assert (
        turned["lost"]["others"] < plain["lost"]["others"] / 1.5 and turned["largest"] < plain["largest"] / 2
    )


def test_all_grids_side_by_side(desk: Desk) -> None:
    found = line.compare(desk, asked({"tensor": DOWN, "grid": "int4-g16-asym"}))
    w = desk.checkpoint.read(DOWN).float()[:16]
    rows = {row["grid"]: row for row in found["rows"]}
    assert {"int4-g16-asym", "q4_k", "nf4-b64", "iq2_s", "mxfp4"} <= set(rows) and len(rows) > 60
    for name in ("int4-g16-asym", "q4_k", "e8p"):
        assert rows[name]["relative"] == pytest.approx(
            relative(w, parse_grid(name).round(w).dense()), rel=1e-4
        )
    sizes = [row["bits"] for row in found["rows"]]
    front = [row["rmse"] for row in found["rows"] if row["front"]]
    assert sizes == sorted(sizes) and front == sorted(front, reverse=True)
    narrow = line.compare(desk, asked({"tensor": QUERY}))
    assert {one["grid"] for one in narrow["left"]} >= {"q4_k", "iq2_s"}, "rows of 128 are no K-quant's"


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor": "nothing"},
        {"tensor": "model.norm.weight"},
        {"tensor": DOWN, "row": 128},
        {"tensor": DOWN, "row": -1},
        {"tensor": DOWN, "row": 10**30},
        {"tensor": DOWN, "row": True},
        {"tensor": DOWN, "row": 1.0},
        {"tensor": DOWN, "column": 256},
        {"tensor": DOWN, "rows": 1 << 30},
        {"tensor": DOWN, "shown": 100000},
        {"tensor": DOWN, "outlier": 1e308},
        {"tensor": DOWN, "outlier": "3"},
        {"tensor": DOWN, "turn": 1},
        {"tensor": DOWN, "grid": "int4-g999999"},
        {"tensor": DOWN, "grid": "../../etc/passwd"},
        {"tensor": DOWN, "grid": "levels(1,2)-b64"},
        {"tensor": DOWN, "grid": "levels(1e,--,.)-b64"},
        {"tensor": DOWN, "grid": "spqr3-g16-o99999999999"},
        {"tensor": DOWN, "grid": "x" * 4000},
        {"tensor": ["model"]},
        {"tensor": DOWN, "path": "/etc/passwd"},
        {},
    ],
    ids=lambda fields: json.dumps(fields)[-60:],
)
def test_what_is_out_of_bounds_is_refused(desk: Desk, fields: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        line.on_grid(desk, asked(fields))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"text": NaN}',
        b"\xff\xfe",
        b"[" * 10000,
        b'{"text": 1' + b"0" * 9000 + b"}",
    ],
    ids=range(8),
)
def test_bodies_that_are_no_object_are_refused(body: bytes) -> None:
    assert len(body) <= MOST_BYTES
    with pytest.raises(Refused):
        digits.number(Asked.read(body, digits.FIELDS))


def bits_of(found: dict[str, Any], name: str) -> str:
    row = next(row for row in found["rows"] if row["name"] == name)
    return "".join(bits for part, bits in row["parts"] if part not in ("scale", "zero"))


@pytest.mark.parametrize(
    "text", ["0.1", "-3", "1", "65504", "1e-7", "6.1e-5", "-0", "447", "1e30", "2.5e-41"]
)
def test_bits_are_those_of_other_programs(text: str) -> None:
    found, x = digits.number(asked({"text": text}, digits.FIELDS)), float(text)
    assert bits_of(found, "fp32") == f"{struct.unpack('>I', struct.pack('>f', x))[0]:032b}"
    if abs(x) <= 65504:
        assert bits_of(found, "fp16") == f"{struct.unpack('>H', struct.pack('>e', x))[0]:016b}"
    rounded = torch.tensor(x).to(torch.bfloat16)
    assert bits_of(found, "bf16") == f"{int(rounded.view(torch.int16)) & 0xFFFF:016b}"
    if abs(x) <= 448:
        eight = torch.tensor(x).to(torch.float8_e4m3fn)
        assert bits_of(found, "fp8 e4m3") == f"{int(eight.view(torch.uint8)):08b}"
    for row in found["rows"]:
        if row["name"].startswith(("fp", "bf")) and row["value"] is not None:
            arithmetic = row["made"].replace("×", "*").replace("−", "-").replace("^", "**")
            assert eval(arithmetic) == pytest.approx(row["value"], rel=1e-6), row  # noqa: S307
        if row["off"] is not None:
            assert row["off"] == pytest.approx(abs(row["value"] - x) / abs(x), rel=1e-4, abs=2e-8)


@pytest.mark.parametrize(
    "name", ["mxfp8", "mxfp4", "nvfp4", "nf4-b64", "int8-g32-sym", "int4-g32-asym", "q4_0"]
)
def test_blocks_are_those_of_the_grids(name: str) -> None:
    found = digits.number(asked({"text": "0.3", "largest": 2.0}, digits.FIELDS))
    row = next(row for row in found["rows"] if row["name"] == name)
    grid = parse_grid(name)
    w = torch.zeros(1, grid.block[1])
    w[0, :2] = torch.tensor([0.3, 2.0])
    stored: Quantized = grid.round(w)
    assert row["value"] == pytest.approx(float(stored.dense()[0, 0]), rel=1e-6)
    assert int(bits_of(found, name), 2) == int(stored.codes[0, 0])
    left, right = row["made"].replace("−", "-").split(" × ")
    assert eval(left) * eval(right) == pytest.approx(row["value"], rel=1e-3)  # noqa: S307


@pytest.mark.parametrize(
    "text", ["", "abc", "nan", "inf", "1e999", "0x10", "1_000", "9" * 101, "1e-9999", EVIL]
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        digits.number(asked({"text": text}, digits.FIELDS))


def test_a_number_beyond_half_precision_says_so() -> None:
    rows = {row["name"]: row for row in digits.number(asked({"text": "1e6"}, digits.FIELDS))["rows"]}
    assert rows["fp16"]["value"] is None and "infinity" in rows["fp16"]["note"]
    assert rows["fp8 e4m3"]["value"] == 448 and "largest" in rows["fp8 e4m3"]["note"]
    assert rows["q4_0"]["value"] is None and "65,504" in rows["q4_0"]["note"]


def test_a_file_of_bitmills_shows_its_report(file: Path, tiny_llama: Path) -> None:
    stored, original = open_source(str(file)), open_source(str(tiny_llama))
    found = made(file, stored, original)
    assert found is not None and len(found.tensors) == 21
    body, cells = sections(found, ["bitmill quantize MODEL Q4_0"])
    assert (
        "Block by block" not in body
        and "nearest : Q4_0" in body
        and "MODEL Q4_0</code>" in body
        and len(cells["at"]) == 21
    )
    row = next(row for row in found.tensors if row["name"] == DOWN)
    w = original.read(DOWN).float()
    assert row["relative"] == pytest.approx(relative(w, stored.read(DOWN).float()), rel=1e-3)
    panel = found.panel(DOWN)
    assert panel["type"] == "q4_0" and panel["worst"] and panel["block"]["points"]
    for name in ("nothing", "model.norm.weight"):
        with pytest.raises(Refused):
            found.panel(name)
    assert "another model" not in body
    other = made(file, stored, stored)
    assert other is not None and "another model" in sections(other)[0], "its own values are not those before"
    alone = made(file, stored, None)
    assert alone is not None
    with pytest.raises(Refused, match="before"):
        alone.panel(DOWN)


def test_a_report_that_makes_no_sense_breaks_nothing(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / file.name
    shutil.copy(file, copy)
    report = copy.with_name(copy.name + ".report.json")
    rows = [
        {"name": DOWN, "role": "down", "layer": 1, "shape": [128, 256], "grid": "q4_0"},
        {"name": EVIL, "role": "q", "layer": 0, "shape": [1, 32], "grid": "q4_0"},
        {"name": "a", "role": "q", "layer": 0, "shape": [10**30, 32], "grid": "q4_0"},
        {"name": "a", "role": "q", "layer": -5, "shape": [1, 32], "grid": "q4_0"},
        {"name": "a", "role": "q", "layer": 0, "shape": [1, 32], "grid": EVIL},
        {"name": "a", "role": EVIL, "layer": 0, "shape": None, "grid": None},
        7,
    ]
    errors: dict[str, Any] = {
        DOWN: {"relative": 0.1},
        EVIL: {"relative": 0.2, "weighted": EVIL},
        "a": {"relative": 1},
    }
    notes = [{"kind": EVIL, "where": EVIL, "text": EVIL}, 3]
    told = {
        "rows": rows,
        "recipe": EVIL,
        "container": 3,
        "bytes": "many",
        "bpw": math.inf,
        "bpw_linears": None,
    }
    for told_plan in (told, {**told, "rows": EVIL}, {}):
        wild = {
            "plan": told_plan,
            "tensors": errors,
            "notes": notes,
            "blocks": {"0": EVIL},
            "seconds": [],
            "bitmill": EVIL,
        }
        report.write_text(json.dumps(wild))
        answers = opened(open_source(str(copy)))
        sound_and_live(answers.page)
    whole = {"plan": told, "tensors": errors, "blocks": {f"block {i}": 0.01 * i for i in range(3)}}
    report.write_text(json.dumps(whole))
    assert "Block by block" in opened(open_source(str(copy))).page
    for text in ("[]", '{"plan": 3}', "{"):
        report.write_text(text)
        assert made(copy, open_source(str(copy)), None) is None


def sound_and_live(page: str) -> None:
    """Like any page, but that it may ask its own server."""
    sound(page)
    assert "connect-src 'self'" in page and 'id="explore"' in page and EVIL not in page


def test_the_page_of_a_model_and_of_none(tiny_llama: Path) -> None:
    answers = opened(open_source(str(tiny_llama)))
    sound_and_live(answers.page)
    assert set(answers.asks) == {"number", "line", "compare", "tensors"}
    for words in ("Widths of the cache", "turboquant", "Memory of running it", "int4-g32-asym-sbf16-z1"):
        assert words in answers.page
    alone = opened(None)
    sound(alone.page)
    assert set(alone.asks) == {"number"} and 'id="explore"' not in alone.page
    assert answers.asks["tensors"](b'{"block": "0"}')["all"] == 7
    with pytest.raises(Refused):
        answers.asks["tensors"](b'{"block": "900"}')
