"""Recipes and ``--kv`` call the same ways to store keys and values by the same names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill import mill
from bitmill.core import registry
from bitmill.core.axes import cache_of
from bitmill.core.cache_choice import cache_choice
from bitmill.core.cache_words import FIXED, held_word, not_by_token, parse_cache
from bitmill.core.errors import BadRecipe, Refused
from bitmill.core.inputs import CACHE_EXAMPLES
from bitmill.numerics.inputs import rounded
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.kept import attend, kept_as, new_cache
from bitmill.run.load import load_model
from bitmill.source import open_path
from tests.cli.command import Command
from tests.tiny import make_model, tokens

ELSEWHERE = ("int8", "fp8", "fp8-e4m3")
"""Short for something else in recipes, and refused there or said so."""
WORDS = (*CACHE_EXAMPLES, *registry.cache_spellings(), *FIXED)
SHORT = {"calib": tokens(), "nsamples": 4, "seqlen": 32}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command ``bitmill``."""
    return Command(capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "model", head_dim=64)


@pytest.mark.parametrize("word", sorted(set(WORDS)))
def test_each_knows_the_others_words(word: str) -> None:
    """It means the same to both, or one says why it cannot and what would work."""
    method = registry.find_cache_method(word)
    try:
        grid = parse_cache(word)
    except BadRecipe as error:
        assert method is not None and error.fix is not None
        assert word in ELSEWHERE or (f"--kv {word}" in error.fix and not_by_token(method) is not None)
        return
    assert parse_cache(str(grid)) == grid
    if grid.static:
        assert method is None or word in ELSEWHERE
        with pytest.raises(Refused, match="fixed by calibration") as caught:
            cache_choice(str(grid))
        assert f"cache={grid}" in str(caught.value)
        return
    assert str(method) == str(grid) == held_word(grid) == str(cache_choice(word).keys)


@pytest.mark.parametrize("word", sorted(set(WORDS)))
@pytest.mark.parametrize("head", [64, 128])
def test_simulated_is_held(word: str, head: int) -> None:
    """The numbers that a recipe rounds to are those that a cache gives back, bit for bit."""
    try:
        grid = parse_cache(word)
    except BadRecipe:
        return
    if grid.static:
        return
    x = torch.randn(2, 3, 9, head, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0], x[0, 0, 1] = 0, 3
    code = registry.cache_method(word).code("k", head, {})
    assert torch.equal(rounded(grid, x, {}), code.back(code.unpack(code.pack(x))))


@pytest.mark.parametrize(
    ("word", "why"), [("kivi-2", "16 bits"), ("int4-channel", "share a step"), ("turboquant-2.5", "orders")]
)
def test_what_no_recipe_can_simulate(word: str, why: str) -> None:
    with pytest.raises(BadRecipe, match=why) as caught:
        parse(f"nearest : int4-g32-sym, cache={word} > bitmill")
    assert f"--kv {word}" in str(caught.value)


def test_eight_bits_are_two_things() -> None:
    with pytest.raises(BadRecipe, match="two things") as caught:
        parse_cache("int8")
    for word in ("int8-tensor-static", "int8-token"):
        assert word in str(caught.value) and str(parse_cache(word)) == word


def test_containers_that_cannot_say_it(model: Path) -> None:
    source = open_path(model)
    with pytest.raises(Refused, match="> bitmill"):
        plan(parse("nearest : int4-g32-sym, cache=turboquant-3 > compressed-tensors"), source)
    with pytest.raises(Refused, match="groups of 40"):
        plan(parse("nearest : int4-g32-sym, cache=int4-g40 > bitmill"), source)


@pytest.mark.parametrize("word", ["turboquant-3", "q4_0-rot", "int4-token-asym-clip0.95"])
def test_a_file_is_run_as_it_says(model: Path, tmp_path: Path, word: str) -> None:
    """Hooks that round and a cache that holds give the same logits, token by token."""
    mill.quantize(
        str(model), f"nearest : int8-channel-sym, cache={word} > bitmill", tmp_path / "out", **SHORT
    )
    source, ids = open_path(tmp_path / "out"), tokens(1, 24, seed=5)
    assert {str(how) for how in cache_of(source).values()} == {word}
    assert kept_as(None, source) == kept_as(word, source) == (word, True)
    assert kept_as("f16", source) == ("f16", False)
    with pytest.raises(Refused, match="round them again"):
        kept_as("q8_0", source)
    assert kept_as("q8_0", open_path(model)) == ("q8_0", False)
    simulated, held = load_model(source), load_model(source, held=True)
    cache = new_cache(word, held.config, "f32")
    attend(held, cache)
    with torch.no_grad():
        wanted = simulated(ids).logits
        first = held(ids[:, :20], past_key_values=cache, use_cache=True).logits
        last = held(ids[:, 20:], past_key_values=cache, use_cache=True).logits
        exact = load_model(source, held=True)(ids).logits
    found = torch.cat((first, last), 1)
    assert float((found - wanted).abs().max()) < 0.1 * float((exact - wanted).abs().max())


def test_the_verb_holds_what_the_file_says(model: Path, tmp_path: Path, command: Command) -> None:
    mill.quantize(
        str(model), "nearest : int4-g32-sym, cache=turboquant-3 > bitmill", tmp_path / "out", **SHORT
    )
    words = (tmp_path / "out", "Why?", "--max-tokens", "4")
    cache = command("run", *words, "--json").json["memory"]["cache"]
    assert cache["kv"] == "turboquant-3" and cache["bytes"] == cache["predicted_bytes"] > 0
    said = command("run", *words, "--kv", "kivi-2")
    assert said.code != 0 and "again" in said.err
    found = command(
        "summarize", _text(tmp_path), tmp_path / "out", "--bullets", "1", "--max-tokens", "8", "--json"
    )
    assert found.code == 0, found.err
    assert found.json["rows"][0]["memory"]["cache"]["kv"] == "turboquant-3"


def _text(folder: Path) -> Path:
    (folder / "text.md").write_text("The tower is old. A light is in it.\n")
    return folder / "text.md"
