"""The loop: sizes as planned, both walks agree with a plain reference, refusals leave nothing behind."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitmill import forecast, mill, walk
from bitmill.calibrate.moments import load_moments
from bitmill.calibrate.stream import Stream
from bitmill.core.axes import Seam
from bitmill.core.errors import Interrupted, Refused, Unsolvable
from bitmill.journal import report_path
from bitmill.numerics.linear_maps import Diagonal
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_source
from bitmill.transforms.awq import Awq
from tests.tiny import CONFIGS, make_model, tokens

RECIPES = [
    "nearest : q8_0, embed=q8_0 > gguf",
    "gptq : q4_0, embed=q8_0 > gguf",
    "gptq : int4-g32-asym > compressed-tensors",
    "awq + gptq : int4-g32-asym > compressed-tensors",
    "hadamard + gptq : int4-g32-asym > compressed-tensors",
    "gptq : int4-g32-sym > gptq",
    "hqq : int4-g32 > bitmill",
    "clip : int4-g32-asym > compressed-tensors",
]


def size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != "bitmill-report.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_the_plans_and_the_file_reads_back(recipe: str, model: Path, tmp_path: Path) -> None:
    source = open_source(str(model))
    out = tmp_path / ("out.gguf" if recipe.endswith("gguf") else "out")
    made = plan(parse(recipe), source, out, nsamples=4, seqlen=32)
    report = mill.quantize(source, recipe, out, calib=tokens(32, 32), nsamples=4, seqlen=32)
    assert size(out) == made.bytes_ == report.bytes_
    assert json.loads(report_path(out).read_text())["plan"]["bytes"] == made.bytes_
    again = open_source(str(out))
    assert set(again.tensors) >= {row.name for row in made.rows}
    x = tokens(2, 32, seed=9)
    reference, ours = (s.logits(s.hidden(x)).log_softmax(-1) for s in (Stream(source), Stream(again)))
    kld = (reference.exp() * (reference - ours)).sum(-1).mean()
    assert kld < 1.2  # 4 bits cost this sensitive little model about half a nat
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("transform", ["awq", "hadamard"])
def test_folding_leaves_the_function_as_it_was(family: str, transform: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family)
    source = open_source(str(model))
    mill.quantize(
        source, f"{transform} + nearest : int8-g32-asym > bitmill", tmp_path / "out", calib=tokens()
    )
    x = tokens(2, 32, seed=5)
    a, b = (s.logits(s.hidden(x)) for s in (Stream(source), Stream(open_source(str(tmp_path / "out")))))
    assert (a - b).abs().max() < 0.05 * a.abs().max()


def test_staged_and_two_pass_walks_solve_the_same_first_group(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "gptq : int4-g32-asym > bitmill"
    mill.quantize(str(model), recipe, tmp_path / "staged", calib=tokens(8, 32))
    monkeypatch.setattr(walk, "STAGED_BYTES", 0)
    mill.quantize(str(model), recipe, tmp_path / "passes", calib=tokens(8, 32))
    a, b = (open_source(str(tmp_path / name)) for name in ("staged", "passes"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (a.read(name) == b.read(name)).float().mean() > 0.99  # sums in another order may flip a tie
    later = "model.layers.0.mlp.down_proj.weight"
    assert (
        a.read(later) == b.read(later)
    ).float().mean() < 0.99  # staged: it has seen the error of the groups before it


def test_calibrated_beats_plain_rounding(model: Path, tmp_path: Path) -> None:
    source, x = open_source(str(model)), tokens(8, 32, seed=3)
    reference = Stream(source)
    target = reference.logits(reference.hidden(x)).log_softmax(-1)
    kld = {}
    for solver in ("nearest", "gptq"):
        mill.quantize(source, f"{solver} : int3-g32-asym > bitmill", tmp_path / solver, calib=tokens(32, 32))
        stream = Stream(open_source(str(tmp_path / solver)))
        log_q = stream.logits(stream.hidden(x)).log_softmax(-1)
        kld[solver] = float((target.exp() * (target - log_q)).sum(-1).mean())
    assert kld["gptq"] < kld["nearest"]


def test_moments_saved_merged_and_used_again(model: Path, tmp_path: Path) -> None:
    recipe, saved = "gptq : int4-g32-asym > bitmill", tmp_path / "m.safetensors"
    mill.quantize(str(model), recipe, tmp_path / "a", calib=tokens(8, 32), save=saved)
    mill.quantize(str(model), recipe, tmp_path / "b", moments=saved)
    a, b = (open_source(str(tmp_path / name)) for name in "ab")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(a.read(name), b.read(name))
    other = make_model(tmp_path / "other", seed=7)
    with pytest.raises(Refused, match="another model"):
        mill.quantize(str(other), recipe, tmp_path / "c", moments=saved)


def test_nothing_is_overwritten_and_a_finished_run_is_recognised(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(Refused, match="exists"):
        mill.quantize(str(model), "q8_0", out)
    assert out.read_text() == "mine"
    mill.quantize(str(model), "q8_0", out, force=True)
    before = out.read_bytes()
    report = mill.quantize(str(model), "q8_0", out)
    assert any(note.kind == "present" for note in report.notes)
    assert out.read_bytes() == before
    with pytest.raises(Refused, match="exists"):
        mill.quantize(str(model), "nearest : q4_0 > gguf", out)


def test_another_recipe_does_not_resume_and_names_the_field(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    def stop(where: str) -> None:
        if where == "block 0: journaled":
            raise KeyboardInterrupt

    with pytest.raises(mill.Interrupted, match="same command"):
        mill.quantize(str(model), "q8_0", out, boundary=stop)
    assert not out.exists()
    with pytest.raises(Refused, match="recipe"):
        mill.quantize(str(model), "nearest : q4_0, embed=q8_0 > gguf", out)
    report = mill.quantize(str(model), "q8_0", out)
    assert report.resumed == 2


def test_a_recipe_that_writes_other_files_is_named_before_them(model: Path, tmp_path: Path) -> None:
    def stop(where: str) -> None:
        if where == "block 0: journaled":
            raise KeyboardInterrupt

    with pytest.raises(mill.Interrupted):
        mill.quantize(str(model), "nearest : int4-g32-sym > gptq", tmp_path / "out", boundary=stop)
    with pytest.raises(Refused, match="another recipe is here"):
        mill.quantize(str(model), "nearest : int8-g32-sym > gptq", tmp_path / "out")


def test_nan_weights_are_refused_and_nothing_stays(model: Path, tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"1 of .* NaN"):
        mill.quantize(str(broken), "q8_0", tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_an_exploding_block_stops_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "EXPLOSION", 1e-6)
    with pytest.raises(Unsolvable, match="block 0"):
        mill.quantize(str(model), "gptq : int2-g32-asym > bitmill", tmp_path / "out", calib=tokens())
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder_and_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast.os, "access", lambda *_: False)
    with pytest.raises(Refused, match="cannot write"):
        mill.quantize(str(model), "q8_0", tmp_path / "out.gguf")
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Refused, match="free"):
        mill.quantize(str(model), "q8_0", tmp_path / "out.gguf")


def test_an_architecture_without_a_table_is_calibrated_but_not_folded(tmp_path: Path) -> None:
    from transformers import StableLmConfig

    from tests.tiny import tokenizer

    config = StableLmConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer()),
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    report = mill.quantize(
        str(tmp_path / "model"), "gptq : int4-g32-asym > compressed-tensors", tmp_path / "out", calib=tokens()
    )
    assert len(report.tensors) == 14
    with pytest.raises(Refused, match="no table"):
        mill.quantize(str(tmp_path / "model"), "awq + gptq : int4-g32-asym", tmp_path / "no", calib=tokens())


def test_a_solver_does_not_change_which_types_a_mixture_names(model: Path) -> None:
    source = open_source(str(model))
    sizes = {
        plan(parse(f"{solver} : Q4_0 > gguf"), source).bpw_linears for solver in ("nearest", "gptq", "clip")
    }
    assert sizes == {4.5}


def test_cross_moments_compare_the_quantized_stream_with_the_original_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken again the plain way: both models whole, up to the second block, and what its linears see."""
    recipe, saved, x = "gptq(asymmetric=0.25) : int3-g32-asym > bitmill", tmp_path / "m", tokens(6, 32)
    monkeypatch.setattr(walk, "STEP_TOKENS", 64)  # three micro-batches
    mill.quantize(str(model), recipe, tmp_path / "out", calib=x, save=saved)
    known, _ = load_moments(saved)
    inputs: list[dict[str, torch.Tensor]] = []
    paths = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    for folder in (model, tmp_path / "out"):
        stream, seen = Stream(open_source(str(folder))), {}
        hidden = stream.block(0).forward(stream.embed(x))
        stream.block(1).watched(hidden, {p: partial(seen.__setitem__, p) for p in paths})
        inputs.append(seen)
    for path in paths:
        was, now = (seen[path].flatten(0, 1) for seen in inputs)
        moments = known[f"model.layers.1.{path}.weight"]
        assert moments.cross is not None and moments.gram is not None
        scale = float(moments.gram.abs().max())
        torch.testing.assert_close(moments.gram, now.T @ now, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(moments.cross, (was - now).T @ now, rtol=0, atol=1e-4 * scale)
        assert float(moments.cross.abs().max()) > 1e-3 * scale
    first = known["model.layers.0.self_attn.q_proj.weight"].cross
    assert first is not None and not first.any()
    with pytest.raises(Refused, match="original model"):
        mill.quantize(
            str(model), "gptq : int3-g32-asym > bitmill", tmp_path / "p", calib=x, save=tmp_path / "n"
        )
        mill.quantize(str(model), recipe, tmp_path / "q", moments=tmp_path / "n")


@pytest.mark.parametrize("options", ["", ", sequential=false"])
def test_asymmetric_calibration_resumes_with_both_streams(options: str, model: Path, tmp_path: Path) -> None:
    recipe = f"awq + gptq(asymmetric=0.25{options}) : int3-g32-asym > bitmill"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mill.quantize(str(model), recipe, whole, calib=tokens(6, 32))

    def stop(event: str) -> None:
        if event == "block 1: live renamed":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        mill.quantize(str(model), recipe, parts, calib=tokens(6, 32), boundary=stop)
    report = mill.quantize(str(model), recipe, parts, calib=tokens(6, 32))
    assert report.resumed
    a, b = (open_source(str(folder)) for folder in (whole, parts))
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


@pytest.mark.parametrize(
    "at", ["block 0: journaled", "block 1: journaled", "block 2: synced", "block 3: journaled"]
)
def test_blocks_without_activations_are_done_again(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations of every second block only: a resumed run goes back to the last there are."""
    monkeypatch.setattr(walk, "blocks_between", lambda *_: 2)
    model, recipe = make_model(tmp_path / "model", num_hidden_layers=4), "gptq : int3-g32-asym > bitmill"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mill.quantize(str(model), recipe, whole, calib=tokens(6, 32))

    def stop(event: str) -> None:
        if event == at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        mill.quantize(str(model), recipe, parts, calib=tokens(6, 32), boundary=stop)
    left = {path.name for path in (tmp_path / "parts.partial").glob("live-*")}
    assert left <= {"live-block-1.safetensors"}
    report = mill.quantize(str(model), recipe, parts, calib=tokens(6, 32))
    assert report.resumed == {"block 0": 1, "block 1": 3, "block 2": 3, "block 3": 5}[at.partition(":")[0]]
    a, b = (open_source(str(folder)) for folder in (whole, parts))
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


def test_a_solver_that_is_not_sequential_sees_the_block_as_it_was(model: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("true", "false")}
    saved = {name: tmp_path / f"{name}.safetensors" for name in folders}
    for name, out in folders.items():
        recipe = f"gptq(sequential={name}) : int3-g32-asym > bitmill"
        mill.quantize(str(model), recipe, out, calib=tokens(8, 32), save=saved[name])
    stream, seen = Stream(open_source(str(model))), {}
    block, path = stream.block(0), "mlp.down_proj"
    block.watched(stream.embed(tokens(8, 32)), {path: partial(seen.__setitem__, path)})
    x = seen[path].flatten(0, 1)
    grams = {
        name: load_moments(file)[0][f"model.layers.0.{path}.weight"].gram for name, file in saved.items()
    }
    error = {name: float((gram - x.T @ x).norm() / (x.T @ x).norm()) for name, gram in grams.items()}
    assert error["false"] < 1e-5 < 1e-3 < error["true"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_values_are_scaled_too_and_the_function_stays(kv_heads: int, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen2", num_key_value_heads=kv_heads)
    source, x = open_source(str(model)), tokens(2, 32, seed=5)
    recipe = "awq(shared=true) + nearest : int8-g32-asym > bitmill"
    report = mill.quantize(source, recipe, tmp_path / "out", calib=tokens())
    gains = {note.where: note.value for note in report.notes if note.kind == "transform"}
    assert gains["block 0 value"] is not None and gains["block 0 value"] < 1
    again = open_source(str(tmp_path / "out"))
    a, b = (s.logits(s.hidden(x)) for s in (Stream(source), Stream(again)))
    assert (a - b).abs().max() < 0.05 * a.abs().max()
    name = "model.layers.0.self_attn.v_proj.bias"
    assert not torch.allclose(source.read(name), again.read(name), rtol=0.01)


def test_a_fold_that_does_not_help_its_block_is_taken_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map that is worse than none, whatever its fit says of it."""

    def harmful(self: Awq, seam: Seam, layer: int, width: int, readers: object) -> tuple[Diagonal, float]:
        scale = torch.ones(width)
        scale[::7] = 100.0
        return Diagonal(scale), 0.5

    x = tokens(4, 32)
    mill.quantize(str(model), "gptq : int4-g32-asym > bitmill", tmp_path / "plain", calib=x)
    monkeypatch.setattr(Awq, "fit", harmful)
    for name, limit in (("staged", walk.STAGED_BYTES), ("passes", 0)):
        monkeypatch.setattr(walk, "STAGED_BYTES", limit)
        report = mill.quantize(str(model), "awq + gptq : int4-g32-asym > bitmill", tmp_path / name, calib=x)
        notes = [note for note in report.notes if note.kind == "transform"]
        assert [note.where for note in notes] == ["block 0", "block 1", "block 2"]
        assert all("nothing folded" in note.text for note in notes)
    a, b = (open_source(str(tmp_path / name)) for name in ("plain", "staged"))
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)
