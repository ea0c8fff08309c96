"""Grids of single tensors by pattern, in every container that holds several: planned, written, read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill import mill
from bitmill.core.errors import Refused
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_source
from tests.tiny import make_model

RECIPES = [
    r"nearest : int4-g64-sym, /layers\.0\./=int8-g64-sym > gptq",
    r"nearest : int4-g64-asym, /layers\.0\./=int8-channel-sym, /1.*v_proj/=bf16 > compressed-tensors",
    r"nearest : int4-g64-bias, /layers\.0\./=int8-g64-bias, /embed/=int8-g64-bias > mlx",
    r"nearest : int4-g64-sym, /layers\.0\./=int8-g64-sym > auto-round",
    r"nearest : int4-g64-fz, /layers\.0\./=int8-g64-fz > hqq",
    r"nearest : nf4-b64, /layers\.0\./=fp4-b64 > bitsandbytes",
    r"nearest : int8-channel-sym, /layers\.0\./=int4-g64-sym > torchao",
    r"nearest : q4_k, /blk\.0\./=q6_k, /token_embd/=q8_0 > gguf",
    r"nearest : q4_k, /layers\.0\./=q6_k, /embed/=q8_0 > bitmill",
    r"nearest : fp8-e4m3-b128, /layers\.0\./=bf16 > fp8",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
    return make_model(folder, dtype="bfloat16", **sizes)


@pytest.mark.parametrize("line", RECIPES)
def test_each_has_its_own(model: Path, line: str, tmp_path: Path) -> None:
    source, recipe = open_source(str(model)), parse(line)
    made = plan(recipe, source)
    assert parse(str(recipe)) == recipe and not any("no matrix" in remark for remark in made.remarks)
    (_, first), *_ = recipe.tensors
    kinds = {row.name: str(row.grid) for row in made.rows if row.role in ("q", "down")}
    stem = str(made.recipe.grid)
    for name, kind in kinds.items():
        wanted = first if ".0." in name else stem
        assert kind == wanted or kind.startswith(f"{wanted}-"), name
    out = tmp_path / ("out.gguf" if recipe.container == "gguf" else "out")
    mill.quantize(source, line, out)
    back = open_source(str(out))
    for row in made.rows:
        if row.solved:
            wanted = row.grid.round(source.read(row.name).float()).dense()
            assert torch.equal(back.read(row.name).float(), wanted.to(back.read(row.name).dtype).float()), (
                row.name
            )


def test_the_first_pattern_decides_and_roles_before_all(model: Path) -> None:
    patterns = r"/layers\.0\./=int8-g64-sym, /v_proj|up_proj/=int3-g64-sym, /absent/=bf16"
    recipe = parse(f"nearest : int4-g64-sym, v=int8-channel-sym, {patterns} > bitmill")
    made = plan(recipe, open_source(str(model)))
    kinds = {row.name.removeprefix("model.layers."): str(row.grid).removesuffix("-sf16") for row in made.rows}
    assert kinds["0.self_attn.v_proj.weight"] == kinds["1.self_attn.v_proj.weight"] == "int8-channel-sym"
    assert kinds["0.mlp.up_proj.weight"] == "int8-g64-sym" and kinds["1.mlp.up_proj.weight"] == "int3-g64-sym"
    assert kinds["1.mlp.down_proj.weight"] == "int4-g64-sym"
    assert "/absent/ is in no matrix's name" in made.remarks


def test_a_container_of_one_width_refuses(model: Path) -> None:
    with pytest.raises(Refused, match="four bits, not 8"):
        plan(parse(r"nearest : int4-g64-asym, /layers\.0\./=int8-g64-asym > awq"), open_source(str(model)))


def test_a_router_is_asked_for_by_its_role(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "m", "mixtral")))
    rows = plan(parse(r"nearest : int4-g32-asym, /layers/=int8-channel-sym > bitmill"), source).rows
    assert all((str(row.grid)[:4] == "int8") == row.solved for row in rows if row.layer is not None)
    assert not any(row.solved for row in rows if row.role == "router")
