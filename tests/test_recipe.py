"""Recipes: every known name parses, text round-trips, and what is wrong is named with what would work."""

from pathlib import Path

import pytest

from bitmill.containers.gptq import Gptq
from bitmill.core.errors import BadRecipe
from bitmill.known import KNOWN
from bitmill.recipe import Call, parse


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_names_parse_in_any_case_and_round_trip(name: str) -> None:
    recipe = parse(name)
    assert parse(name.upper()) == recipe
    assert parse(name.replace("-", "_")) == recipe
    assert parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "awq + gptq(damp=0.02) : int4-g64-asym > compressed-tensors",
        "gptq : q4_0, embed=q8_0, keep=v+down > gguf",
        "nearest : mxfp4, dtype=bf16 > compressed-tensors",
        "nearest : Q4_K_M > gguf",
        r"nearest : Q4_K_M, embed=q8_0, /blk\.[0-3]\.ffn_(up|down)/=q6_k, /^(?:a:b>c,d=e)$/=f16, pure > gguf",
        "gptq : int4-g128-asym > gptq(version=2)",
        "gptq(damp=0.1, order=natural) : int3-g128-sym, fallback=int8-channel-sym > compressed-tensors",
    ],
)
def test_text_round_trips(text: str) -> None:
    assert str(parse(str(parse(text)))) == str(parse(text))


def test_options_are_values() -> None:
    recipe = parse("gptq(damp=0.1, refit=off):int4-g64-asym")
    assert recipe.solver == Call("gptq", (("damp", 0.1), ("refit", False)))
    assert recipe.container == "compressed_tensors"


def test_solver_settles_what_the_grid_leaves_open() -> None:
    assert parse("hqq : int4-g64").grid == "int4-g64-fz"
    assert parse("gptq : int4-g64").grid == "int4-g64-sym"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Q4_K_X", "Q4_K"),
        ("gptqq : int4-g64", "gptq"),
        ("gptq(dmap=0.1) : int4-g64", "damp"),
        ("gptq : int4-g64, embd=q8_0", "embed"),
        ("gptq : int4-g64 > ggfu", "gguf"),
        ("gptq : int4-q64", "int4"),
        ("", "empty"),
        ("gptq : int4-g64, dtype=f64", "f32"),
        ("gptq( : int4", "name"),
        ("gptq : ", "no grid"),
        ("Q4_K_M, /ffn/=q4_k_m", "mixture"),
        ("Q4_K_M, /ffn/=q9_k", "no grid"),
        ("Q4_K_M, /ffn/", "no value"),
        ("Q4_K_M, /(ffn/=q8_0", "'(ffn' does not compile"),
        (r"Q4_K_M, /\D/=q8_0", "lower case"),
        ("Q4_K_M, /[[:digit:]]/=q8_0", "[0-9]"),
        ("Q4_K_M, /(?<=a)b/=q8_0", "portable"),
        ("Q4_K_M, /(?i)ffn/=q8_0", "portable"),
        ("Q4_K_M, /(a+)+b/=q8_0", "for ever"),
        ("Q4_K_M, //=q8_0", "empty"),
        ("Q4_K_M, purr", "no value"),
        ("int4-g64, pure", "mixture"),
        ("int4-g64, /v_proj/=q4_k_m", "one tensor has one type"),
        ("Q4_K_M, pure > bitmill", "GGUF"),
    ],
)
def test_typos_are_refused_with_a_hint(text: str, part: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        parse(text)
    assert part in str(caught.value)


def test_types_of_single_tensors_keep_their_order_and_lose_their_case() -> None:
    recipe = parse(r"Q4_K_M, /FFN_down/=q6_k, pure, /ffn/=Q8_0")
    assert recipe.tensors == (("ffn_down", "q6_k"), ("ffn", "q8_0")) and recipe.pure
    assert parse(str(recipe)) == recipe


def test_types_of_single_tensors_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("grid = 'Q4_K_M'\npure = true\n[tensors]\n'ffn_(up|down)' = 'q6_k'\n'ffn' = 'q8_0'\n")
    assert str(parse(str(path))) == "nearest : Q4_K_M, /ffn_(up|down)/=q6_k, /ffn/=q8_0, pure > gguf"
    path.write_text("grid = 'Q4_K_M'\n[tensors]\n'a/b' = 'q6_k'\n")
    with pytest.raises(BadRecipe, match="slash"):
        parse(str(path))


def test_toml_files(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'transforms = ["awq"]\nsolver = "gptq(damp=0.02)"\ngrid = "int4-g64-asym"\nkeep = ["v"]\n'
    )
    assert str(parse(str(path))) == "awq + gptq(damp=0.02) : int4-g64-asym, keep=v > compressed-tensors"
    path.write_text('recipe = "Q8_0"\n')
    assert parse(str(path)) == parse("q8_0")
    path.write_text('solvr = "gptq"\ngrid = "int4-g64"\n')
    with pytest.raises(BadRecipe, match="solver"):
        parse(str(path))
    with pytest.raises(BadRecipe):
        parse(str(tmp_path / "missing.toml"))


def test_options_of_a_container() -> None:
    recipe = parse("gptq : int4-g64-asym > gptq(version=2)")
    assert recipe.container == "gptq" and recipe.make_container() == Gptq(version=2)
    assert parse("gptq : int4-g64-asym > gptq").make_container() == Gptq()
    for text, said in (
        ("gptq(version=3)", "versions 1 and 2"),
        ("gptq(versoin=2)", "did you mean 'version'"),
        ("awq(version=2)", "takes none"),
        ("gguf(split=3)", "no option 'split'"),
    ):
        with pytest.raises(BadRecipe, match=said.replace("(", ".")):
            parse(f"nearest : int4-g64-asym > {text}")
