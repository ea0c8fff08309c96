"""Mixtures of experts: one weight an expert in a folder, one stack of all in a GGUF file, the same model."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmill import mill
from bitmill.account import Report
from bitmill.calibrate.importance import take_imatrix
from bitmill.calibrate.moments import load_moments
from bitmill.calibrate.stream import Stream
from bitmill.calibrate.tokens import Calibration
from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.imatrix import Entry, Imatrix, write_imatrix
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, BadRecipe, Refused
from bitmill.core.experts import parse_experts
from bitmill.core.registry import parse_grid
from bitmill.families.base import describe
from bitmill.grids.integer import Integer
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from bitmill.source import open_source
from tests.test_gguf import logits, write
from tests.tiny import EXPERTS, make_model, tokens

every_family = pytest.mark.parametrize("family", EXPERTS)
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_survives_the_round_trip(family: str, tied: bool, tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", family, tied=tied))
    write(source, tmp_path / "out.gguf", "f32")
    back = GgufCheckpoint(tmp_path / "out.gguf")
    assert set(back.tensors) == set(source.tensors)
    assert all(torch.equal(back.read(name), source.read(name)) for name in source.tensors)
    ids = tokens(2, 24)
    assert torch.allclose(logits(back, ids), logits(source, ids), atol=1e-4)
    parts = "nearest : f32, split-max-tensors=5 > gguf"
    mill.quantize(source, parts, tmp_path / "parts")
    found = open_source(str(tmp_path / "parts"))
    assert all(torch.equal(found.read(name), source.read(name)) for name in source.tensors if "exp" in name)
    write(back, tmp_path / "again.gguf", "f32")
    assert GgufCheckpoint(tmp_path / "again.gguf").config == back.config


@every_family
def test_stacks_hold_the_experts_in_order(family: str, tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", family))
    made = write(source, tmp_path / "out.gguf", "q4_1")
    back, count = GgufCheckpoint(tmp_path / "out.gguf"), EXPERTS[family].keywords
    assert all(back.stored(name).same_values(q) for name, q in made.items())  # type: ignore[union-attr]
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    stack = theirs["blk.1.ffn_down_exps.weight"]
    values = gguf.dequantize(stack.data, stack.tensor_type)
    paths = describe(source.config).names
    template = next(path for path, role in paths.items() if role == "down")
    for expert in range(count.get("num_local_experts") or count["num_experts"]):
        name = f"model.layers.1.{template.format(expert)}.weight"
        assert np.array_equal(values[expert], back.read(name).numpy()), name
    assert theirs["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"


@every_family
def test_a_stream_runs_what_transformers_runs(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family)
    stream, ids = Stream(open_source(str(folder))), tokens(2, 24)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(stream.logits(stream.hidden(ids)), model(ids).logits, atol=1e-4)


@every_family
@pytest.mark.parametrize(
    "recipe",
    ["Q4_K_M", "MXFP4_MOE", "hadamard + nearest : q8_0 > gguf", "clip : q4_1", "nvfp4, embed=q8_0 > gguf"],
)
def test_a_recipe_from_end_to_end(family: str, recipe: str, tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", family, **WIDE)))
    mill.quantize(source, recipe, tmp_path / "out.gguf")
    back, ids = GgufCheckpoint(tmp_path / "out.gguf"), tokens(2, 24)
    stacks = {t.type.name for n, t in back.file.tensors.items() if "_exps" in n}
    assert ("MXFP4" in stacks) == (recipe == "MXFP4_MOE")
    for name in source.tensors:  # logits would say little: a rounded token goes to another expert
        want, got = source.read(name), back.read(name)
        if "hadamard" in recipe:  # norms are folded, all else is rotated; see test_rotations.py
            break
        assert float((got - want).norm() / want.norm()) < 0.2, name
    mill.quantize(back, "hf-f32", tmp_path / "folder")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
        assert torch.equal(model(ids).logits, load_model(back)(ids).logits)


@every_family
def test_every_expert_has_its_own_scale_beside_nvfp4(family: str, tmp_path: Path) -> None:
    """One vector a stack, as llama.cpp multiplies by it; read back with the bytes, and checked."""
    source = open_source(str(make_model(tmp_path / "model", family, **WIDE)))
    mill.quantize(source, "nearest : nvfp4, embed=q8_0 > gguf", tmp_path / "out.gguf")
    back = GgufCheckpoint(tmp_path / "out.gguf")
    template = next(path for path, role in describe(source.config).names.items() if role == "down")
    count = source.config.get("num_local_experts") or source.config["num_experts"]
    names = [f"model.layers.1.{template.format(e)}.weight" for e in range(count)]
    scales = back.file.dense("blk.1.ffn_down_exps.scale")
    assert scales.shape == (count,)
    for scale, name in zip(scales, names, strict=True):
        expected = parse_grid("nvfp4").round(source.read(name).float())
        stored = back.stored(name)
        assert stored is not None
        assert torch.equal(stored.codes, expected.codes)
        assert torch.equal(stored.params["gain"], 1 / scale)
        assert torch.allclose(stored.params["gain"], expected.params["gain"], rtol=1e-6)
    place, good = back.file.tensors["blk.1.ffn_down_exps.scale"].offset, (tmp_path / "out.gguf").read_bytes()
    (tmp_path / "out.gguf").write_bytes(good[:place] + struct.pack("<f", -1.0) + good[place + 4 :])
    damaged = GgufCheckpoint(tmp_path / "out.gguf")
    damaged.read(names[1])
    with pytest.raises(BadFile, match="positive"):
        damaged.read(names[0])


@every_family
def test_what_calibration_cannot_do_is_refused_before_it_starts(family: str, tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", family, **WIDE)))
    with pytest.raises(Refused, match="other tokens") as caught:
        plan(parse("gptq(asymmetric=0.25) : q4_0 > gguf"), source)
    assert ".experts.0." in str(caught.value.where)
    assert plan(parse("gptq : q4_0 > gguf"), source).needs == "gram"


@every_family
@pytest.mark.parametrize("seqlen", [24, 4])
def test_every_expert_has_the_moments_of_its_own_tokens(family: str, seqlen: int, tmp_path: Path) -> None:
    """Against transformers' own experts, watched from outside: what their router sends where."""
    folder = make_model(tmp_path / "model", family)
    source, ids = open_source(str(folder)), tokens(2, seqlen)
    matrix = take_imatrix(source, Calibration(ids, {})).imatrix
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer, block in enumerate(model.model.layers):
        seen = {}
        block.mlp.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(args=args))
        with torch.no_grad():
            model(ids)
        hidden, chosen, _ = seen["args"]
        for kind in ("gate", "up", "down"):
            entry = matrix.entries[f"blk.{layer}.ffn_{kind}_exps.weight"]
            assert entry.counts.tolist() == [int((chosen == e).sum()) for e in range(len(entry.counts))]
            for expert, weight in enumerate(block.mlp.experts.gate_up_proj):
                x = hidden[(chosen == expert).any(-1)]
                if kind == "down":
                    gate, up = (x @ weight.T).chunk(2, -1)
                    x = torch.nn.functional.silu(gate) * up
                torch.testing.assert_close(entry.in_sum2[expert], x.square().sum(0), rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("recipe", ["gptq", "awq + gptq(sequential=false)"])
def test_feedback_on_experts_beats_rounding(family: str, recipe: str, tmp_path: Path) -> None:
    """Each expert's error on the inputs that it saw, in both ways to walk a block."""
    source, ids = open_source(str(make_model(tmp_path / "model", family, **WIDE))), tokens(16, 48)
    mill.quantize(
        source, f"{recipe} : int3-g32-asym > bitmill", tmp_path / "out", calib=ids, save=tmp_path / "moments"
    )
    known, _ = load_moments(tmp_path / "moments")
    back, grid = open_source(str(tmp_path / "out")), Integer(bits=3, group=32, zero="asym")
    experts = [name for name in source.tensors if ".experts." in name]
    assert len(experts) >= 3 * 3 * 4
    ratios = []
    for name in experts:
        gram, weight = known[name].gram, source.read(name).float()
        placed, rounded = (w - weight for w in (back.read(name).float(), grid.round(weight).dense()))
        ratios.append(float((placed @ gram * placed).sum() / (rounded @ gram * rounded).sum()))
    assert max(ratios) < 0.9


@every_family
def test_an_expert_without_tokens_is_rounded_and_said(family: str, tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", family)))
    recipe = "gptq : int4-g32-asym > bitmill"
    report = mill.quantize(source, recipe, tmp_path / "out", calib=tokens(1, 1))
    quiet = {note.where for note in report.notes if "no calibration token" in note.text}
    assert quiet
    back = open_source(str(tmp_path / "out"))
    grid = next(row.grid for row in plan(parse(recipe), source).rows if row.solved)
    for name in [n for joined in quiet for n in joined.split("+")]:
        assert torch.equal(back.read(name).float(), grid.round(source.read(name).float()).dense()), name


def test_an_importance_matrix_knows_every_expert(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", "mixtral")))
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for layer in range(3):
        for name, columns in (("gate", 128), ("up", 128), ("down", 256)):
            sums = 10 * torch.rand(4, columns, generator=generator)
            entries[f"blk.{layer}.ffn_{name}_exps.weight"] = Entry(sums, torch.tensor([5, 5, 0, 5]))
    write_imatrix(tmp_path / "im.gguf", Imatrix(entries, ("x",), 1, 20), "gguf")
    report = mill.quantize(source, "q4_0", tmp_path / "told.gguf", imatrix=tmp_path / "im.gguf")
    without = {n.where for n in report.notes if n.kind == "no-importance"}
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in without
    assert "model.layers.0.block_sparse_moe.experts.1.w1.weight" not in without
    told_of = report.to_json()["experts"]
    assert [b["shown"] for b in told_of["blocks"]] == [[5, 5, 0, 5]] * 3
    assert "sent" not in told_of and told_of["blocks"][0]["sent"] == [None] * 4
    mill.quantize(source, "q4_0", tmp_path / "plain.gguf")
    told, plain = (GgufCheckpoint(tmp_path / f"{x}.gguf") for x in ("told", "plain"))
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
        assert torch.equal(told.read(name), plain.read(name)) == (expert == 2)


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3moe", num_hidden_layers=1)
    text = json.loads((folder / "config.json").read_text())
    changes = (
        ({"norm_topk_prob": False}, "add up to one"),
        ({"mlp_only_layers": [0]}, "every block"),
        ({"num_local_experts": 9}, "a stack has 9"),
    )
    for change, reason in changes:
        (folder / "config.json").write_text(json.dumps({**text, **change}))
        with pytest.raises(Refused, match=reason):
            plan(parse("f16"), open_source(str(folder)))


def test_stacks_that_contradict_the_keys_are_bad(tmp_path: Path) -> None:
    write(SafetensorsFolder(make_model(tmp_path / "model", "mixtral")), tmp_path / "a.gguf", "f16")
    data = (tmp_path / "a.gguf").read_bytes()
    for key, value in (
        ("llama.expert_count", 5),
        ("llama.expert_used_count", 9),
        ("llama.expert_count", 1 << 30),
    ):
        at = data.index(key.encode()) + len(key) + 4
        (tmp_path / "b.gguf").write_bytes(data[:at] + value.to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(BadFile, match="experts"):
            GgufCheckpoint(tmp_path / "b.gguf")


@every_family
@pytest.mark.parametrize(
    ("line", "grave", "said"),
    [
        ("int4-g32-sym > gptq", False, "transformers 5.23 does not load this: experts of a mixture"),
        ("int4-g32-asym > gptq", True, "no loader is known to take this: "),
        ("int4-g32-asym > awq", True, "no loader is known to take this: "),
        ("int4-g32-sym > auto-round", False, "nothing is known against it in SGLang 0.5 and vLLM 0.33"),
        ("nvfp4, dtype=bf16 > compressed-tensors", True, "transformers 5.23 loads other numbers: experts"),
        ("int4-g32-asym > compressed-tensors", False, "zero points"),
        ("int4-g32-sym, keep=gate+up+down > compressed-tensors", False, "kept dense"),
        ("int8-channel-sym, input=int8-token > compressed-tensors", False, "whole bytes"),
        ("int4-g32-sym > compressed-tensors", False, ""),
        ("fp8-e4m3-channel > compressed-tensors", False, ""),
        ("int4-g32-sym, keep=gate+up+down > gptq", False, ""),
        ("bf16 > compressed-tensors", False, ""),
    ],
)
def test_plans_say_what_loaders_do_not_take(
    family: str, line: str, grave: bool, said: str, tmp_path: Path
) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", family, dtype="bfloat16"))
    remarks = plan(parse(line), source).remarks
    found = [text for text in remarks if "transformers " in text or "loader" in text]
    assert [said in text for text in found] == ([True] if said else [])
    assert [text.endswith("--strict refuses this") for text in found] == ([grave] if said else [])
    if grave:
        with pytest.raises(Refused, match="--strict: "):
            plan(parse(line), source, strict=True)
    else:
        plan(parse(line), source, strict=True)


def _seen(source: Checkpoint, line: str, ids: torch.Tensor, out: Path) -> tuple[Report, dict[str, int]]:
    report = mill.quantize(source, line, out, calib=ids)
    return report, {n: int(e["tokens"]) for n, e in report.tensors.items() if ".experts." in n}


@every_family
@pytest.mark.parametrize("solver", ["gptq", "gptq(sequential=false)", "awq + nearest"])
def test_experts_learn_from_the_tokens_a_recipe_says(family: str, solver: str, tmp_path: Path) -> None:
    """Against the counts of the router; hidden states are the same whatever experts are shown."""
    source = open_source(str(make_model(tmp_path / "model", family, num_hidden_layers=2, **WIDE)))
    ids, grid = tokens(8, 24), "int8-channel-sym"
    count = source.config.get("num_local_experts") or source.config["num_experts"]
    used = source.config["num_experts_per_tok"]
    found: dict[str, dict[str, int]] = {}
    for experts in ("route", "all", f"topk={used + 1}", "until=120"):
        line = f"{solver} : {grid}, experts={experts} > bitmill"
        report, found[experts] = _seen(source, line, ids, tmp_path / experts.replace("=", "-"))
        first = [n for n in found[experts] if n.startswith("model.layers.0.")]
        sent = {n: int(report.tensors[n]["sent"]) for n in first}
        assert sum(sent.values()) == 3 * ids.numel() * used
        if experts == "route":
            assert sent == {n: found["route"][n] for n in first}
            routed = sent
        assert sent == routed, "who is shown more is sent no more"
        assert all(report.tensors[n]["tokens"] >= sent[n] for n in first)
        told = report.to_json()["experts"]
        assert told["experts"] == 2 * count and told["shown_least"] == min(
            int(e["tokens"]) for n, e in report.tensors.items() if ".experts." in n
        )
        block = told["blocks"][0]
        assert block["experts"] == list(range(count)) and len(told["blocks"]) == 2
        assert sum(block["sent"]) == ids.numel() * used and min(block["shown"]) >= min(block["sent"])
    assert set(found["all"].values()) == {ids.numel()}
    last = ("w2.weight", "down_proj.weight")
    one_more = [n for n in found["route"] if n.startswith("model.layers.0.") and n.endswith(last)]
    assert sum(found[f"topk={used + 1}"][n] for n in one_more) == ids.numel() * (used + 1)
    for name in one_more:
        assert found["until=120"][name] >= max(120, routed[name])
        assert routed[name] < 120 or found["until=120"][name] <= 1.3 * routed[name]
    assert any(routed[name] < 120 for name in one_more)


@every_family
def test_shown_tokens_are_the_next_by_score_and_add_nothing(family: str, tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", family)))
    ids = tokens(2, 24)
    plain = Stream(source)
    hidden = plain.embed(ids)
    wanted = plain.block(0).forward(hidden)
    for text in ("all", "topk=4", "until=40"):
        block = Stream(source, experts=(parse_experts(text), ids.numel())).block(0)
        torch.testing.assert_close(block.forward(hidden), wanted, rtol=1e-5, atol=1e-5)
    router = next(m for p, m in block.module.named_modules() if p.endswith("mlp.gate"))
    seen: dict[str, torch.Tensor] = {}
    router.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    template = next(path for path, role in describe(source.config).names.items() if role == "gate")
    path = template.format(1)
    block.watched(hidden, {path: lambda x: seen.update(shown=x)})
    x = seen["x"].reshape(-1, seen["x"].shape[-1])
    scores, _, chosen = router(x)
    mine = (chosen == 1).any(-1)
    rest = scores[:, 1].masked_fill(mine, -torch.inf).argsort(descending=True)[: 40 - int(mine.sum())]
    assert torch.equal(seen["shown"], torch.cat([x[mine], x[rest.sort().values]]))


def test_plans_and_refusals_of_expert_tokens(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", "qwen3moe", **WIDE)))
    line = "gptq : int4-g32-asym, experts=until=512 > bitmill"
    assert str(parse(line)) == line
    said = plan(parse(line), source, nsamples=8, seqlen=64).remarks
    assert any(
        "each is sent about 192 of 512" in text and "until=512 shows each 512" in text for text in said
    )
    said = plan(parse("nearest : int4-g32-asym, experts=all > bitmill"), source).remarks
    assert any("experts=all is for nothing" in text for text in said)
    dense = open_source(str(make_model(tmp_path / "dense")))
    assert any("no experts to place" in text for text in plan(parse(line), dense).remarks)
    with pytest.raises(BadRecipe, match="until"):
        parse("gptq : int4-g32-asym, experts=until > bitmill")
    mill.quantize(source, line, tmp_path / "one", calib=tokens(2, 16), save=tmp_path / "moments")
    with pytest.raises(Refused, match="chosen before"):
        mill.quantize(source, line, tmp_path / "two", moments=tmp_path / "moments")
