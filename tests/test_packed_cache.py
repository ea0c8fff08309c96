"""Transformers' models with packed caches: what comes out, what it takes, what happens to it on the way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bitmill.checkpoint.safetensors import read_header
from bitmill.core.errors import BadFile, BitmillError, Refused
from bitmill.run.attention import attend_packed
from bitmill.run.cache import cache_of
from bitmill.run.prompt_file import load_prompt, save_prompt
from tests.tiny import make_model, tokens

TEXTS = ["f16", "q8_0", "q4_0-rot", "int4", "int4-channel", "kivi-2,window=20", "fp8-token",
         "turboquant-3.5", "k=turboquant-4-prod,v=turboquant-2", "qjl,window=9", "polarquant",
         "int2-rot,window=5"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def loaded(
    folders: Path, family: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 3
) -> PreTrainedModel:
    """A tiny model with heads of 64. Of one layer where caches are compared: behind it the last place of a
    float turns codes."""
    folder = folders / f"{family}-{layers}"
    if not folder.exists():
        make_model(folder, family, head_dim=64, num_hidden_layers=layers)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def model(folders: Path) -> PreTrainedModel:
    return loaded(folders)


@torch.no_grad()
def logits(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any, steps: tuple[int, ...] = ()
) -> torch.Tensor:
    """Of every token, the prompt in pieces that begin at ``steps``."""
    edges = [0, *steps, ids.shape[1]]
    found = [
        model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pairwise(edges)
    ]
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("text", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)]
)
def test_sixteen_bits_are_what_everybody_has(folders: Path, text: str, dtype: torch.dtype) -> None:
    model, ids = loaded(folders, dtype=dtype), tokens(2, 40)
    usual = logits(model, ids, DynamicCache(config=model.config), (30, 31))
    assert torch.equal(logits(model, ids, cache_of(text, model.config), (30, 31)), usual)
    attend_packed(model)
    ours = logits(model, ids, cache_of(text, model.config), (30, 31))
    apart = (ours - usual).float().norm() / usual.float().norm()
    assert float(apart) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("text", TEXTS)
def test_attention_in_place_is_attention_over_what_is_unpacked(folders: Path, text: str) -> None:
    ids, model = tokens(2, 70), loaded(folders, layers=1)
    unpacked = logits(model, ids, cache_of(text, model.config), (40, 41))
    attend_packed(model)
    torch.testing.assert_close(
        logits(model, ids, cache_of(text, model.config), (40, 41)), unpacked, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("text", ["q4_0", "fp8", "int4-rot", "turboquant-3", "polarquant"])
def test_a_prompt_in_pieces_is_the_whole_prompt(folders: Path, text: str) -> None:
    model, ids = loaded(folders, layers=1), tokens(1, 60)
    whole = logits(model, ids, cache_of(text, model.config))
    pieces = logits(model, ids, cache_of(text, model.config), (7, 8, 33))
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sequences", [1, 3])
def test_bytes_are_as_predicted(model: PreTrainedModel, text: str, sequences: int) -> None:
    cache = cache_of(text, model.config)
    with pytest.raises(Refused, match="empty"):
        cache.predicted(10)
    for length in (5, 1, 290):
        logits(model, tokens(sequences, length), cache)
        assert cache.bytes_ == cache.predicted(cache.get_seq_length(), sequences)
    assert cache.get_seq_length() == 296


@pytest.mark.parametrize("packed", [False, True])
def test_beams_with_left_padding(model: PreTrainedModel, packed: bool) -> None:
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :9] = 0, 0
    asked = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 2,
    }
    usual = model.generate(ids, **asked)
    if packed:
        attend_packed(model)
    assert torch.equal(model.generate(ids, past_key_values=cache_of("f32", model.config), **asked), usual)
    for text in ("q8_0", "kivi-4", "turboquant-3.5"):
        found = model.generate(ids, past_key_values=cache_of(text, model.config), **asked)
        assert found.shape[0] == 3 and found.shape[1] > 12


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen2", "mistral"])
def test_windows_and_caps(folders: Path, family: str) -> None:
    model, ids = loaded(folders, family), tokens(2, 300)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    steps = (120, 121, 290, 291)
    usual = logits(model, ids, DynamicCache(config=model.config), steps)
    torch.testing.assert_close(
        logits(model, ids, cache_of("f32", model.config), steps), usual, rtol=1e-3, atol=1e-3
    )
    attend_packed(model)
    cache = cache_of("f32", model.config)
    torch.testing.assert_close(logits(model, ids, cache, steps), usual, rtol=1e-3, atol=1e-3)
    if family == "gemma3":
        sliding = next(layer for layer in cache.packed if layer.is_sliding)
        assert sliding.k.dropped == 256 and sliding.k.kept == 44
        assert cache.bytes_ == cache.predicted(300, 2)
        with pytest.raises(Refused, match="window of 16"):
            cache.crop(-40)


def test_rewinding(folders: Path) -> None:
    for text in ("turboquant-3", "int4-channel", "kivi-4,window=8"):
        model, ids = loaded(folders, layers=1), tokens(1, 50)
        cache = cache_of(text, model.config)
        logits(model, ids, cache)
        cache.crop(-13)
        assert cache.get_seq_length() == 37
        again = logits(model, ids[:, 37:], cache)
        assert again.shape[1] == 13 and cache.get_seq_length() == 50
    fresh = cache_of("turboquant-3", model.config)
    want = logits(model, ids, fresh)[:, 37:]
    cache = cache_of("turboquant-3", model.config)
    logits(model, torch.cat((ids[:, :37], tokens(1, 9, seed=5)), 1), cache)
    cache.crop(-9)
    torch.testing.assert_close(logits(model, ids[:, 37:], cache), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(Refused, match="cropped to 4"):
        cache.crop(4)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.bytes_ == 0


def test_guessing_ahead(model: PreTrainedModel) -> None:
    ids = tokens(1, 6).repeat(1, 4)
    asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2}
    usual = model.generate(ids, **asked)
    cache = cache_of("f32", model.config)
    found = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **asked)
    assert torch.equal(found, usual)


def test_sequences_move(model: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    cache = cache_of("turboquant-2.5", model.config)
    logits(model, ids, cache)
    before = cache.packed[0].k.dense(0, 99)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.packed[0].k.dense(0, 99), before[[1, 0]])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.packed[0].k.dense(0, 99), before[[0]])


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_kept_in_a_file(model: PreTrainedModel, text: str, tmp_path: Path) -> None:
    ids, more = tokens(2, 45), tokens(2, 3, seed=1)
    cache = cache_of(text, model.config)
    logits(model, ids, cache)
    save_prompt(cache, tmp_path / "prompt", ids, "this one")
    again, found = load_prompt(tmp_path / "prompt", model.config, "this one")
    assert torch.equal(found, ids) and str(again.choice) == str(cache.choice)
    assert torch.equal(logits(model, more, again), logits(model, more, cache))
    assert again.bytes_ == cache.bytes_
    with pytest.raises(Refused, match="another|of the model"):
        load_prompt(tmp_path / "prompt", model.config, "another")
    with pytest.raises(Refused, match="48 tokens"):
        save_prompt(cache, tmp_path / "other", ids)


def test_files_that_do_not_add_up(model: PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    ids, path = tokens(2, 45), tmp_path / "prompt"
    cache = cache_of("turboquant-2.5,window=3", model.config)
    logits(model, ids, cache)
    save_prompt(cache, path, ids)
    facts, held = dict(read_header(path).metadata), load_file(path)

    def edited(change: dict[str, Any], facts_: dict[str, str] | None = None) -> None:
        kept = {name: t for name, t in {**held, **change}.items() if t is not None}
        save_file(kept, tmp_path / "bad", {**facts, **(facts_ or {})})
        with pytest.raises(BitmillError):
            load_prompt(tmp_path / "bad", model.config)

    edited({"0.k.0.codes": None})
    edited({"0.k.0.codes": held["0.k.0.codes"][:, :, :-1].contiguous()})
    edited({"0.k.0.codes": held["0.k.0.codes"].to(torch.int16)})
    edited({"0.k.0.length": held["0.k.0.length"] * float("nan")})
    edited({"0.k.learned.order": held["0.k.learned.order"] * 0})
    edited({"extra": held["ids"].clone()})
    edited({"ids": held["ids"][:, :-1].contiguous()})
    edited({"0.v.recent": held["0.v.recent"][:1].contiguous()})
    for name, text in (("tokens", "44"), ("tokens", "x"), ("dropped.0.k", "3"), ("bitmill.cache", "nothing")):
        edited({}, {name: text})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BadFile):
        load_prompt(path, model.config)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(BadFile, match="no cache"):
        load_prompt(path, model.config)


def test_heads_that_do_not_go(folders: Path) -> None:
    make_model(folders / "eighty", head_dim=80)
    config = AutoModelForCausalLM.from_pretrained(folders / "eighty").config
    with pytest.raises(Refused, match="head of 80.*int4-g40"):
        cache_of("int4", config)
    with pytest.raises(Refused, match="no layer 7"):
        cache_of("q8_0,skip=7", loaded(folders).config)
    assert cache_of("fp8-rot", config) and cache_of("turboquant-2.5", config)
