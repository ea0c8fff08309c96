"""Rotations: what folds leaves the function as it was, in every family; what is left for the runtime is in
the file, and every reader of ours computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitmill import mill
from bitmill.calibrate.moments import MomentSum
from bitmill.calibrate.stream import Stream
from bitmill.core.axes import Checkpoint, cache_of, inputs_of
from bitmill.core.errors import BadFile, BadRecipe, Refused
from bitmill.measurement.measure import Protocol, measure
from bitmill.numerics import hadamard
from bitmill.numerics.inputs import rounded
from bitmill.numerics.linear_maps import Hadamard
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from bitmill.source import open_path, open_source
from bitmill.transfer import convert
from tests.tiny import CONFIGS, EXPERTS, make_model, tokens

FAMILIES = {**CONFIGS, **EXPERTS}
DOWN0 = "model.layers.0.mlp.down_proj"
BOTH = "hadamard(r3=true, r4=true)"
ODD: dict[str, Any] = {
    "hidden_size": 88,  # 2 · 44, by Paley's construction
    "intermediate_size": 172,  # four circulants
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 22,  # twice an odd number: blocks of 2
}


def logits(source: Checkpoint | Path, ids: torch.Tensor) -> torch.Tensor:
    stream = Stream(source if isinstance(source, Checkpoint) else open_path(source))
    return stream.logits(stream.hidden(ids))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "model", num_hidden_layers=2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays_in_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    """R1 where the family allows it, R2, and R4 in the file as the runtime's."""
    source = open_source(str(make_model(tmp_path / "model", family, tied=tied, num_hidden_layers=2)))
    mill.quantize(source, "hadamard(r4=true) + nearest : f32 > bitmill", tmp_path / "out")
    made, ids = open_path(tmp_path / "out"), tokens(2, 24, seed=5)
    wanted = logits(source, ids)
    assert float((logits(made, ids) - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))
    turned = {n for n in source.tensors if not torch.equal(source.read(n), made.read(n))}
    assert any(".o_proj." in n for n in turned) and any(
        n.split(".")[-2] in ("v_proj", "qkv_proj") for n in turned
    )
    stream = "gemma" not in family
    assert ("model.embed_tokens.weight" in turned) == stream
    assert any("gate" in n and "expert" not in n for n in turned) == stream
    assert ("lm_head.weight" in made.tensors) == (not tied or stream)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    down = next(n for n in source.tensors if "down_proj" in n or n.endswith(".w2.weight"))
    order = source.tensors[down].shape[1]
    if not stream:  # without R1, down changes by R4 alone
        torch.testing.assert_close(stored[down], Hadamard.plain(order).read(source.read(down)))
    assert not torch.allclose(stored[down], made.read(down), atol=1e-3)


@pytest.mark.parametrize("options", ["", "block=64", "r1=false", "r2=false, seed=3"])
def test_any_width(options: str, tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", "qwen2", num_hidden_layers=2, **ODD)))
    line = f"hadamard({options + ', ' if options else ''}r4=true) + nearest : f32 > bitmill"
    mill.quantize(source, line, tmp_path / "out")
    ids = tokens(2, 24, seed=5)
    wanted, found = logits(source, ids), logits(tmp_path / "out", ids)
    assert float((found - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))
    rows = {row.name: row for row in plan(parse(line), source).rows}
    assert rows[f"{DOWN0}.weight"].turn == (4 if "block" in options else 172)


def test_a_head_stays_tied_where_the_last_norm_is_one_number(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1.25)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source, ids = open_path(folder), tokens(2, 24, seed=5)
    made = plan(parse("hadamard + nearest : f32 > safetensors"), source)
    assert not any("head" in text for text in made.remarks)
    mill.quantize(source, "hadamard + nearest : f32 > safetensors", tmp_path / "out")
    back = open_path(tmp_path / "out")
    assert "lm_head.weight" not in back.tensors
    assert torch.equal(back.read("model.norm.weight"), tensors["model.norm.weight"])
    assert not torch.equal(back.read("model.embed_tokens.weight"), source.read("model.embed_tokens.weight"))
    torch.testing.assert_close(logits(back, ids), logits(source, ids), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # a plain file: anybody's reader computes the same
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(theirs, logits(source, ids), rtol=1e-4, atol=1e-4)


CONTAINERS = ["bitmill", "compressed-tensors"]


@pytest.mark.parametrize("middle", [256, 192], ids=["a power of two", "a stored matrix"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_what_is_left_for_the_runtime_is_computed(container: str, middle: int, tmp_path: Path) -> None:
    """Inputs of down, and keys, rounded in a rotated basis: stream, model and a plain restatement agree."""
    folder = make_model(tmp_path / "model", num_hidden_layers=2, intermediate_size=middle)
    keys = container == "bitmill"
    line = f"{BOTH if keys else 'hadamard(r4=true)'} + gptq : int4-g32-asym, input=int4-token-asym, "
    line += "cache=int4-token-asym > "
    mill.quantize(str(folder), line + container, tmp_path / "out", calib=tokens(4, 32), nsamples=4, seqlen=32)
    made, ids = open_path(tmp_path / "out"), tokens(2, 24, seed=5)
    inputs, cache = inputs_of(made), cache_of(made)
    assert {n for n, how in inputs.items() if how.basis} == {n for n in inputs if "down_proj" in n}
    assert {n for n, how in cache.items() if how.basis} == {
        n for n in cache if n.endswith("k_scale") and keys
    }
    assert len(cache) == 4 and not any("_scale" in n for n in made.tensors)
    found = logits(made, ids)
    with torch.no_grad():
        assert torch.equal(load_model(made)(ids).logits, found)
    torch.testing.assert_close(by_hand(made, ids), found, rtol=1e-3, atol=1e-3)
    plain = Stream(made, inputs={})
    assert float((plain.logits(plain.hidden(ids)) - found).abs().max()) > 0.05


def by_hand(made: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """The same model with dense matrices in hooks of its own."""
    stream = Stream(made, inputs={})
    hidden = stream.embed(ids)
    for block in stream.blocks():
        turns = {
            n: hadamard.matrix(n).float() / n**0.5 for n in (32, made.tensors[f"{DOWN0}.weight"].shape[1])
        }
        for path, linear in block.linears().items():
            turn = turns[linear.in_features] if "down" in path else torch.eye(linear.in_features)
            grid = inputs_of(made)[f"{block.prefix}{path}.weight"].grid

            def hook(_: Any, args: Any, turn: torch.Tensor = turn, grid: Any = grid) -> Any:
                return (rounded(grid, args[0] @ turn, {}) @ turn.T,)

            linear.register_forward_pre_hook(hook)
        grid = next(iter(cache_of(made).values())).grid

        basis = turns[32] if any(how.basis for how in cache_of(made).values()) else torch.eye(32)

        def change(k: torch.Tensor, v: torch.Tensor, h: torch.Tensor = basis, grid: Any = grid) -> Any:
            return rounded(grid, k @ h, {}) @ h.T, rounded(grid, v, {})

        block.watch_cache("self_attn", change)
        hidden = block.forward(hidden)
    return stream.logits(hidden)


def test_weights_are_solved_for_the_inputs_that_they_get(model: Path, tmp_path: Path) -> None:
    """Gram matrix, largest inputs and all are those of rotated inputs, and so is what rounding is judged
    by."""
    torch.manual_seed(0)
    x, turn = torch.randn(50, 256), Hadamard.plain(256)
    by_turn, by_hand = MomentSum(256, True, turn=turn), MomentSum(256, True)
    by_turn.add(x, "w")
    by_hand.add(turn.turn(x), "w")
    a, b = by_turn.moments(), by_hand.moments()
    assert torch.equal(a.gram, b.gram) and torch.equal(a.absmax, b.absmax)  # type: ignore[arg-type]
    errors = {}
    for name, r4 in (("turned", "true"), ("plain", "false")):
        line = f"hadamard(r1=false, r4={r4}) + gptq : int4-channel-sym, input=int4-token > bitmill"
        report = mill.quantize(str(model), line, tmp_path / name, calib=tokens(8, 32), nsamples=8, seqlen=32)
        errors[name] = report.tensors[f"{DOWN0}.weight"]
    assert errors["turned"] != errors["plain"]
    stored = load_file(tmp_path / "turned" / "model.safetensors")
    codes, scale = stored[f"{DOWN0}.weight.codes"], stored[f"{DOWN0}.weight.scale"].float()
    low = torch.stack([codes & 15, codes >> 4], -1).flatten(1).float()
    read = open_path(tmp_path / "turned").read(f"{DOWN0}.weight")
    torch.testing.assert_close(turn.turn(read.double()).float(), (low - 8) * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "solver", ["nearest", "gptq(sequential=false)", "autoround(steps=2)", "gptq(asymmetric=true)"]
)
def test_every_way_through_a_block(solver: str, model: Path, tmp_path: Path) -> None:
    line = f"{BOTH} + {solver} : int8-channel-sym, input=int8-token, cache=int8-head > bitmill"
    report = mill.quantize(str(model), line, tmp_path / "out", calib=tokens(4, 32), nsamples=4, seqlen=32)
    ids = tokens(2, 24, seed=5)
    wanted, found = logits(model, ids), logits(tmp_path / "out", ids)
    assert float((found - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())
    limit = 0.2 if "asymmetric" in solver else 0.02  # weights then follow the original's inputs
    assert all(error["relative"] < limit for error in report.tensors.values())


def test_fixed_scales_are_of_rotated_keys(model: Path, tmp_path: Path) -> None:
    line = "hadamard(r1=false, r2=false, r3=true) + nearest : f32, cache=int8-head > bitmill"
    mill.quantize(str(model), line, tmp_path / "out", calib=tokens(4, 32), nsamples=4, seqlen=32)
    made, largest = open_path(tmp_path / "out"), {}
    stream = Stream(made, inputs={})
    hidden = stream.embed(tokens(4, 32))
    for block in stream.blocks():

        def see(keys: torch.Tensor, values: torch.Tensor, at: int = block.index) -> Any:
            largest[at] = Hadamard.plain(32).turn(keys).abs().amax((0, 2, 3))
            return keys, values

        block.watch_cache("self_attn", see)
        hidden = block.forward(hidden)
    for at, scale in largest.items():
        found = cache_of(made)[f"model.layers.{at}.self_attn.k_scale"].fixed["scale"].reshape(-1)
        torch.testing.assert_close(found, scale / 127.5, rtol=1e-4, atol=0)


def test_measure_runs_it_and_says_so(model: Path, tmp_path: Path) -> None:
    line = f"{BOTH} + nearest : int8-channel-sym, input=int8-token, cache=int4-token-asym > bitmill"
    mill.quantize(str(model), line, tmp_path / "out")
    how = Protocol(window=32, count=2, floor=False)
    record = measure(str(tmp_path / "out"), str(model), texts=[str(Path(__file__))], protocol=how)
    said = " ".join(note.text for note in record.notes)
    assert "int8-token in a rotated basis" in said and "int4-token-asym in a rotated basis" in said


def test_the_plan_says_all_of_it(model: Path, tmp_path: Path) -> None:
    line = f"{BOTH} + nearest : int4-g32-sym, cache=int4-token-asym > bitmill"
    source = open_source(str(model))
    said = " ".join(plan(parse(line), source, strict=True).remarks)
    assert "order 256" in said and "(R4)" in said and "order 32" in said and "(R3)" in said
    line = "hadamard(r4=true) + nearest : int4-g32-sym, cache=int4-token-asym > compressed-tensors"
    made = plan(parse(line), source)
    said = " ".join(made.remarks)
    assert (
        "transformers 5.23 loads other numbers: the model is rotated while it runs" in said
        and "their scales come with them" in said
    )
    with pytest.raises(Refused, match="--strict: transformers"):
        plan(parse(line), source, strict=True)
    assert "order 256" in made.explain(f"{DOWN0}.weight")
    mill.quantize(source, line, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = config["transform_config"]["config_groups"]
    assert [(g["type"], g["head_dim"]) for g in groups.values()] == [("hadamard", 256)]
    places = [[(a["location"], a["inverse"]) for a in g["apply"]] for g in groups.values()]
    assert places == [[("input", False), ("weight_input", True)]]
    assert config["kv_cache_scheme"]["strategy"] == "group" and config["kv_cache_scheme"]["group_size"] == 32


REFUSED = [
    ("hadamard(r4=true) + nearest : q8_0 > gguf", "gguf files do not say"),
    ("hadamard(r4=true) + nearest : int4-g32-sym > gptq", "gptq files do not say"),
    ("hadamard(r3=true) + nearest : int4-g32-sym > bitmill", "r3 is for a rounded cache"),
    ("hadamard(r3=true) + nearest : int4-g32-sym, cache=fp8 > compressed-tensors", "rounds rotated queries"),
    ("hadamard(r4=true) + nearest : int4-g32-sym, keep=down > bitmill", "no weight of down"),
    ("hadamard(r4=true) + tune(steps=1) : int4-g32-sym > bitmill", "learns with weights as a file has them"),
    ("smoothquant(inner=true) + hadamard(r4=true) + nearest : int8-channel-sym > bitmill", "r4 mixes them"),
    ("hadamard + hadamard(seed=1) + nearest : int4-g32-sym > bitmill", "both rotate residual"),
    ("nearest : int8-channel-sym, input=int8-token-clip0.9 > compressed-tensors", "leave out -clip"),
    ("nearest : int8-channel-sym, cache=int4-token-clip0.9 > compressed-tensors", "leave out -clip"),
    ("nearest : int8-channel-sym, cache=int4-g24-token > bitmill", "no groups of 24"),
]


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_refusals(line: str, said: str, model: Path) -> None:
    with pytest.raises(Refused, match=said):
        plan(parse(line), open_source(str(model)))


@pytest.mark.parametrize(
    "line", ["hadamard(r1=false, r2=false) + nearest : q8_0", "hadamard(block=1) + nearest : q8_0"]
)
def test_no_rotation_at_all(line: str) -> None:
    with pytest.raises(BadRecipe):
        parse(line)


def test_a_reader_that_is_not_known_stops_the_stream(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.extra_proj.weight"] = torch.ones(4, 128)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = open_path(folder)
    with pytest.raises(Refused, match="may read the residual stream") as caught:
        plan(parse("hadamard + nearest : f32 > safetensors"), source)
    assert "extra_proj" in str(caught.value.where)
    plan(parse("hadamard(r1=false) + nearest : f32 > safetensors"), source)


def test_moments_in_another_basis_are_refused(model: Path, tmp_path: Path) -> None:
    kept, grid = tmp_path / "m.safetensors", "gptq : int4-g32-sym > bitmill"
    short = {"nsamples": 4, "seqlen": 32}
    turned = f"hadamard(r4=true) + {grid}"
    mill.quantize(str(model), turned, tmp_path / "a", calib=tokens(4, 32), save=kept, **short)
    for line in (grid, f"hadamard + {grid}", f"hadamard(r4=true, seed=1) + {grid}"):
        with pytest.raises(Refused, match="another basis"):
            mill.quantize(str(model), line, tmp_path / "b", moments=kept)
    mill.quantize(str(model), turned, tmp_path / "c", moments=kept)
    assert len(open_path(tmp_path / "c").tensors)


def test_a_conversion_does_not_lose_the_basis_in_silence(model: Path, tmp_path: Path) -> None:
    line = f"{BOTH} + nearest : int8-channel-sym, input=int8-token, cache=int8-token > bitmill"
    mill.quantize(str(model), line, tmp_path / "a")
    report = convert(str(tmp_path / "a"), "safetensors", tmp_path / "b", requantize=True)
    said = " ".join(report.plan["remarks"])
    assert "int8-token in a rotated basis" in said
    ids = tokens(2, 24, seed=5)
    bare = Stream(open_path(tmp_path / "a"), inputs={})
    torch.testing.assert_close(
        logits(tmp_path / "b", ids), bare.logits(bare.hidden(ids)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("wrong", [3, -1, 512, 1.5, "256", True, 92])
def test_orders_that_cannot_be(wrong: object, model: Path, tmp_path: Path) -> None:
    mill.quantize(str(model), "hadamard(r4=true) + nearest : int8-channel-sym > bitmill", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        head = dict(file.metadata())
    tensors, weights = load_file(path), json.loads(head["bitmill.weights"])
    weights[f"{DOWN0}.weight"][4] = wrong
    save_file(tensors, path, {**head, "bitmill.weights": json.dumps(weights)})
    with pytest.raises(BadFile, match="order of no rotation"):
        open_path(tmp_path / "out")
