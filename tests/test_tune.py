"""Distilled scales: derivatives, codes that stay, values that can be stored, resume, judges, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmill import mill, tuning
from bitmill.calibrate.corpus import Text
from bitmill.calibrate.tokens import Calibration
from bitmill.core import registry
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadRecipe, Interrupted, Refused, Unsolvable
from bitmill.core.learning import ModelTask
from bitmill.core.schooling import Schooling
from bitmill.distilled import Distilled
from bitmill.grids.dense import Dense
from bitmill.held_out import HeldOut, held_out
from bitmill.journal import Workspace
from bitmill.numerics.distilling import windows_of
from bitmill.numerics.moving import all_linear, moving, slopes
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from bitmill.solvers.tune import Tune
from bitmill.source import open_source
from bitmill.transfer import convert
from bitmill.walk import Walk
from tests.tiny import make_model, tokens

EXAMPLES = [g for cls in registry.members("grids").values() for g in cls.examples()]
MOVES = {
    "int4-g64-sym": ("scale",),
    "int4-g64-asym": ("scale",),
    "int4-g64-fz": ("zero", "scale"),
    "int4-g64-bias": ("bias", "scale"),
    "nf4-b64": ("absmax",),
    "nf4-b64-dq": (),
    "nvfp4": ("scale",),
    "mxfp4": (),
    "q4_0": ("d",),
    "q4_1": ("d", "m"),
    "q4_k": ("d", "dmin"),
    "q6_k": ("d",),
    "iq4_xs": ("d",),
    "iq2_xs": ("d",),
    "e8p": ("scale",),
    "llm-int8": ("absmax",),
    "fp8-e4m3-channel": ("scale",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide"), hidden_size=256, num_hidden_layers=2)


@pytest.fixture
def same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows that teach judge, too: what a random model says of one text tells nothing of another."""

    def both(calibration: Calibration, _: Checkpoint) -> HeldOut:
        return HeldOut(calibration.tokens, calibration.tokens, {"text": "the same", "windows": 1})

    monkeypatch.setattr(tuning, "held_out", both)


def _weight(out: int = 8) -> Tensor:
    return 0.1 * torch.randn(out, 256, generator=torch.Generator().manual_seed(0))


def _values(path: Path) -> dict[str, Tensor]:
    made = open_source(str(path))
    return {name: made.read(name).float() for name in made.tensors}


@pytest.mark.parametrize("text", MOVES)
def test_what_moves_is_not_stored_as_whole_numbers(text: str) -> None:
    assert moving(registry.parse_grid(text)) == MOVES[text]


@pytest.mark.parametrize("grid", [g for g in EXAMPLES if moving(g)], ids=str)
def test_derivatives_by_scales_are_those_of_moving_each(grid: Any) -> None:
    """Values are linear in a single scale: half of it more is half the derivative."""
    rng = torch.Generator().manual_seed(1)
    quantized = grid.round(_weight(160 if grid.block[0] > 1 else 8))
    names, values = moving(grid), quantized.dense()
    gradient = torch.randn(values.shape, generator=rng)
    found = slopes(quantized, names, all_linear(quantized, names), values, gradient)
    for name in names:
        scale = quantized.params[name]
        assert found[name].shape == scale.shape
        for at in torch.randint(scale.numel(), (6,), generator=rng).tolist():
            more = scale.clone()
            more.view(-1)[at] *= 1.5
            moved = grid.decode(quantized.codes, {**quantized.params, name: more})
            wanted = float(((moved - values).double() * gradient).sum()) * 2
            scale_of = float((values * gradient).abs().sum()) / scale.numel()
            assert float(found[name].view(-1)[at]) == pytest.approx(wanted, rel=1e-3, abs=1e-4 * scale_of)


def _walked(model: Path, out: Path, recipe: str, ids: Tensor) -> Walk:
    """A walk that has written its output, which is not sealed."""
    source = open_source(str(model))
    made = plan(parse(recipe), source, out, nsamples=len(ids), seqlen=ids.shape[1])
    space = Workspace(out, made.files, not made.files[0].path)
    walk = Walk(made, source, space, lambda *_: None, Calibration(ids), {}, "cpu", False)
    space.open({}, False)
    walk.run({}, [], 0.0)
    return walk


@pytest.mark.parametrize(("inputs", "rounded"), [("", False), (", input=int8-token", True)])
def test_lessons_in_half_the_bits_point_the_same_way(inputs: str, rounded: bool, tmp_path: Path) -> None:
    """What rounds its inputs is multiplied as it was rounded, in float32."""
    model, ids = make_model(tmp_path / "model"), tokens(3, 24)
    walk = _walked(model, tmp_path / "out", f"nearest + tune : int3-g32-asym{inputs} > bitmill", ids)
    original, found, losses = tuning.Stream(walk.source).head(), [], []
    for half in (False, True):
        ours = Distilled(walk, Tune(half=half), range(3))
        loss, slopes = ours.lesson(ids, ours.wanted(ids), original, ours.start()[0])
        found.append(torch.cat([slopes[name].flatten() for name in sorted(slopes)]))
        losses.append(loss)
    assert losses[1] == pytest.approx(losses[0], rel=0 if rounded else 0.05)
    assert float(torch.cosine_similarity(*found, dim=0)) > (1 - 1e-6 if rounded else 0.98)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_derivatives_through_the_model_are_autograds(family: str, tmp_path: Path) -> None:
    """Against transformers' own model, with an integer grid written out."""
    model, ids = make_model(tmp_path / "model", family), tokens(3, 24)
    walk = _walked(model, tmp_path / "out", "nearest + tune : int3-g32-asym > bitmill", ids)
    ours = Distilled(walk, Tune(half=False), range(3))
    start, units = ours.start()
    original = tuning.Stream(walk.source).head()
    loss, found = ours.lesson(ids, ours.wanted(ids), original, start)

    teacher = load_model(walk.source)
    student = load_model(walk.container.open(walk.space.payload))
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    named = {n: leaves[n] for n in ours.norms}
    for name, weight in ours.weights.items():
        scale, zero = (
            t.repeat_interleave(32, 1)
            for t in (leaves[f"{name}:scale"], weight.placed.params["zero"].float())
        )
        named[name] = scale * (weight.placed.codes.float() - zero)
    half = ids.shape[1] // 2
    with torch.no_grad():
        theirs = torch.log_softmax(teacher(ids).logits[:, half:], -1)
    logits = torch.func.functional_call(student, named, (ids,)).logits[:, half:]
    wanted = (theirs.exp() * (theirs - torch.log_softmax(logits, -1))).sum(-1).mean()
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert found.keys() == start.keys()
    for name, slope in found.items():
        grad = leaves[name].grad
        assert grad is not None
        torch.testing.assert_close(
            slope, grad * units[name], rtol=1e-3, atol=2e-6 * float(slope.abs().max()) + 1e-9
        )


RECIPES = {
    "int2-g32-asym > bitmill": "model",
    "int4-g32-sym > compressed-tensors": "model",
    "int3-g32-asym > gptq(version=2)": "model",
    "int4-g64-bias > mlx": "model",
    "int3-g64-fz > hqq": "model",
    "nf4-b64 > bitsandbytes": "model",
    "nvfp4, dtype=bf16 > compressed-tensors": "model",
    "q4_0 > gguf": "model",
    "Q3_K_M > gguf": "wide",
    "Q2_K > gguf": "wide",
    "IQ4_XS > gguf": "wide",
}


@pytest.mark.usefixtures("same_text")
@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_stay_scales_move_and_can_be_stored(
    recipe: str, model: Path, wide: Path, tmp_path: Path
) -> None:
    source, ids = str(model if RECIPES[recipe] == "model" else wide), tokens(8, 32)
    suffix = ".gguf" if recipe.endswith("gguf") else ""
    before, after = (tmp_path / f"{name}{suffix}" for name in ("before", "after"))
    mill.quantize(source, f"gptq : {recipe}", before, calib=ids)
    report = mill.quantize(source, f"gptq + tune(steps=20, rate=0.004) : {recipe}", after, calib=ids)
    facts = report.tuning
    assert 0 < facts["best_step"] <= 20 and facts["least"] < facts["first"]
    assert [step for step, *_ in facts["trace"]] == list(range(2, 21, 2))
    assert [note.kind for note in report.notes if note.kind == "tuned"] == ["tuned"]
    old, new = open_source(str(before)), open_source(str(after))
    changed = 0
    for name in new.tensors:
        one, other = old.stored(name), new.stored(name)
        if one is None or other is None or isinstance(other.grid, Dense):
            continue
        assert torch.equal(one.codes, other.codes), name
        for key, value in other.params.items():
            if key in moving(other.grid):
                assert torch.equal(other.grid.stored_scale(key, value.float()), value.float())
                changed += not torch.equal(value, one.params[key])
            else:
                assert torch.equal(value, one.params[key]), (name, key)
    assert changed
    norms = [name for name in new.tensors if "norm" in name]
    assert norms and any(not torch.equal(old.read(name), new.read(name)) for name in norms)


def test_the_report_measures_what_a_reader_gets(model: Path, tmp_path: Path) -> None:
    """The divergence of the written file, by transformers' own model, is the one that was reported."""
    ids = tokens(8, 32)
    report = mill.quantize(
        str(model), "tune(steps=10, rate=0.01) : int3-g32-asym > bitmill", tmp_path / "out", calib=ids
    )
    judges = held_out(Calibration(ids), open_source(str(model))).judges
    ours, theirs = (load_model(open_source(str(p))) for p in (tmp_path / "out", model))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(judges).logits[:, 16:], -1) for m in (theirs, ours))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(report.tuning["least"], rel=1e-3)


@pytest.mark.usefixtures("same_text")
@pytest.mark.parametrize(
    "stop", ["tune 4: journaled", "tune 6: live written", "tune: found: journaled", "tune: written: written"]
)
@pytest.mark.parametrize("recipe", ["int3-g32-asym > gptq(version=2)", "q4_0 > gguf"])
def test_a_resumed_run_writes_the_same_bytes(recipe: str, stop: str, model: Path, tmp_path: Path) -> None:
    line, ids = f"gptq + tune(steps=20, rate=0.01) : {recipe}", tokens(8, 32)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def boundary(event: str) -> None:
        if event == stop:
            raise KeyboardInterrupt

    one = mill.quantize(str(model), line, whole, calib=ids)
    with pytest.raises(Interrupted):
        mill.quantize(str(model), line, parts, calib=ids, boundary=boundary)
    other = mill.quantize(str(model), line, parts, calib=ids)
    assert other.resumed > 4
    same = ("first", "least", "best_step", "trace", "judge")
    assert {k: one.tuning[k] for k in same} == {k: other.tuning[k] for k in same}
    files = [whole] if whole.is_file() else [p for p in whole.iterdir() if p.suffix == ".safetensors"]
    for file in files:
        twin = parts if whole.is_file() else parts / file.name
        assert file.read_bytes() == twin.read_bytes()
    again = mill.quantize(str(model), line, parts, calib=ids)
    assert again.tuning == other.tuning


@pytest.mark.parametrize("line", [
    "awq + gptq + tune(steps=4) : int4-g32-asym > compressed-tensors",
    "hadamard + tune(steps=4) : int4-g32-sym > bitmill",
    "smoothquant + gptq + tune(steps=4) : int8-channel-sym, input=int8-tensor-static > compressed-tensors",
    "gptq + tune(steps=4, norms=false) : int4-g32-sym, input=int8-token, dtype=bf16 > compressed-tensors",
    "autoround(steps=2) + tune(steps=4) : nvfp4, input=nvfp4, dtype=bf16 > compressed-tensors",
])  # fmt: skip
def test_it_goes_with_every_axis(line: str, model: Path, tmp_path: Path) -> None:
    assert str(parse(line)) == str(parse(str(parse(line))))
    report = mill.quantize(str(model), line, tmp_path / "out", calib=tokens(8, 32))
    assert report.tuning["least"] <= report.tuning["first"]
    assert all(torch.isfinite(v).all() for v in _values(tmp_path / "out").values())


@pytest.mark.usefixtures("same_text")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "mixtral", "qwen3moe"])
def test_every_family_and_experts_too(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family)
    report = mill.quantize(
        str(model),
        "tune(steps=6, rate=0.01) : int3-g32-asym > bitmill",
        tmp_path / "out",
        calib=tokens(8, 32),
    )
    assert report.tuning["least"] < report.tuning["first"]


def test_without_a_better_step_nothing_changes(model: Path, tmp_path: Path) -> None:
    """At 8 bits there is next to nothing to win, and huge steps lose it."""
    ids = tokens(4, 32)
    report = mill.quantize(
        str(model), "tune(steps=3, rate=0.1) : int8-channel-sym > bitmill", tmp_path / "tuned", calib=ids
    )
    assert report.tuning["best_step"] == 0 and report.tuning["least"] == report.tuning["first"]
    assert "no step was better" in next(n.text for n in report.notes if n.kind == "tuned")
    mill.quantize(str(model), "nearest : int8-channel-sym > bitmill", tmp_path / "plain", calib=ids)
    ours, theirs = _values(tmp_path / "tuned"), _values(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _task(judged: list[float], losses: list[float], kept: list[Any]) -> ModelTask:
    start = {"a": torch.ones(2)}
    lessons, judges = iter(losses), iter(judged)

    def lesson(_: Mapping[str, Tensor], windows: Tensor) -> tuple[float, dict[str, Tensor]]:
        assert windows.max() < 8
        return next(lessons), {"a": torch.tensor([1.0, -1.0])}

    def keep(*what: Any) -> None:
        kept.append(what)

    school = Schooling(8, lesson, lambda _: next(judges), 0, {}, {}, keep, lambda *_: None)
    return ModelTask(start, start, school)


def test_the_best_step_is_kept() -> None:
    kept: list[Any] = []
    tuned = Tune(steps=10, rate=0.01).tune(_task([1.0, 0.5, 0.4, *[0.6] * 8], [1.0] * 10, kept))
    assert (tuned.facts["best_step"], tuned.facts["least"]) == (2, 0.4)
    assert "stopped" not in tuned.facts and len(kept) == 9 and len(tuned.facts["trace"]) == 10
    assert 0.97 < float(tuned.leaves["a"][0]) < 1 < float(tuned.leaves["a"][1]) < 1.03


def test_a_loss_that_is_no_number_stops_at_the_best() -> None:
    tuned = Tune(steps=10, rate=0.01).tune(_task([1.0, 0.5, 0.7], [1.0, 1.0, float("nan")], []))
    assert tuned.facts["best_step"] == 1 and "no longer a number at step 2" in tuned.facts["stopped"]


def test_a_divergence_that_runs_away_stops_at_the_best() -> None:
    tuned = Tune(steps=10, rate=0.01).tune(_task([1.0, 9.0], [1.0], []))
    assert tuned.facts["best_step"] == 0 and "ran away: 9" in tuned.facts["stopped"]
    assert torch.equal(tuned.leaves["a"], torch.ones(2))


def test_windows_come_once_before_any_comes_again() -> None:
    seen = torch.cat([windows_of(10, 3, step, seed=0) for step in range(3)])
    assert len(seen.unique()) == 9
    assert not torch.equal(windows_of(10, 3, 0, seed=0), windows_of(10, 3, 3, seed=0))
    assert len(windows_of(2, 8, 5, seed=0)) == 2


def _mixture(kinds: Mapping[str, int]) -> Calibration:
    sources = [{"kind": kind, "name": f"text {kind}", "windows": n} for kind, n in kinds.items()]
    return Calibration(tokens(sum(kinds.values()), 16), {"sources": sources})


def test_the_last_kind_of_a_mixture_judges(model: Path) -> None:
    mixture = _mixture({"own": 10, "docs": 5, "code": 3})
    held = held_out(mixture, open_source(str(model)))
    assert torch.equal(held.taught, mixture.tokens[:15]) and torch.equal(held.judges, mixture.tokens[15:])
    assert held.facts["text"].startswith("code (text code)") and held.facts["windows"] == 3


def test_one_kind_is_judged_by_another(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(model))
    for kind, judge in (("docs", "code"), ("code", "markdown")):
        held = held_out(_mixture({kind: 10}), source)
        assert len(held.taught) == 10 and held.facts["text"].startswith(judge) and len(held.judges) == 8
    monkeypatch.setattr("bitmill.held_out.default_calibration", lambda _: (Text("code", "short", ("a",)),))
    held = held_out(_mixture({"docs": 10}), source)
    assert (len(held.taught), len(held.judges)) == (9, 1) and "kept aside" in held.facts["text"]
    assert "no other" in held_out(_mixture({"docs": 1}), source).facts["text"]


def test_the_plan_says_what_it_takes(model: Path) -> None:
    source = open_source(str(model))
    plain = plan(parse("gptq : int4-g32-asym > bitmill"), source)
    tuned = plan(parse("gptq + tune(steps=500) : int4-g32-asym > bitmill"), source)
    more = plan(parse("gptq + tune(steps=5000) : int4-g32-asym > bitmill"), source)
    assert plain.seconds < tuned.seconds < more.seconds and plain.peak_bytes <= tuned.peak_bytes
    assert any("500 steps of 4 windows through the whole model" in line for line in tuned.headline)
    assert (
        tuned.digest != plain.digest and plan(parse("tune : int4-g32-asym > bitmill"), source).nsamples == 128
    )


@pytest.mark.parametrize(("line", "said"), [
    ("gptq + tune : mxfp4, dtype=bf16 > compressed-tensors", "no scale that can move"),
    ("tune(steps=0) : int4-g32 > bitmill", "teach nothing"),
    ("tune(rate=0.5) : int4-g32 > bitmill", "rate is a part"),
    ("tune + tune : int4-g32 > bitmill", "enough"),
    ("tune + gptq : int4-g32 > bitmill", "transform"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_refused(line: str, said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=said):
        mill.quantize(str(model), line, tmp_path / "out", calib=tokens())
    assert not list(tmp_path.iterdir())


def test_a_grid_that_does_not_move_is_named_where_others_do(model: Path) -> None:
    made = plan(parse("tune : int4-g32-sym, down=mxfp4 > bitmill"), open_source(str(model)))
    assert any("leaves 3 weights on mxfp4 as they are" in remark for remark in made.remarks)


def test_moments_do_not_teach(model: Path, tmp_path: Path) -> None:
    known, ids = tmp_path / "moments", tokens(4, 32)
    mill.quantize(str(model), "gptq : int4-g32 > bitmill", tmp_path / "a", calib=ids, save=known)
    with pytest.raises(Refused, match="tune learns"):
        mill.quantize(str(model), "gptq + tune : int4-g32 > bitmill", tmp_path / "b", moments=known)
    with pytest.raises(Refused, match="--calib TEXT instead of --imatrix"):
        plan(parse("tune : q4_0 > gguf"), open_source(str(model)), nsamples=0, seqlen=0)


def test_too_little_memory_is_said_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "available_bytes", lambda: 1 << 20)
    with pytest.raises(Refused, match="batch=1"):
        mill.quantize(str(model), "tune : int4-g32 > bitmill", tmp_path / "out", calib=tokens())
    assert not list(tmp_path.iterdir())


def test_a_conversion_tunes_nothing(model: Path, tmp_path: Path) -> None:
    mill.quantize(str(model), "nearest : int4-g32-sym > gptq", tmp_path / "a")
    with pytest.raises(BadRecipe, match="tune"):
        convert(str(tmp_path / "a"), "tune : int4-g32-sym > compressed-tensors", tmp_path / "b")


def test_recipes_read_as_they_are_said() -> None:
    made = parse("best + tune(steps=7) : Q4_K_M")
    assert str(made.solver) == "gptq(sweeps=4)" and str(made.tune) == "tune(steps=7)"
    assert str(parse("awq + tune : int4-g64")) == "awq + nearest + tune : int4-g64-sym > compressed-tensors"
    assert parse(str(made)) == made
    assert str(parse("efficientqat")).startswith("efficientqat + tune : int2-g64-asym")


def test_a_layout_that_reads_back_as_something_else_is_a_defect(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitmill.distilled.relabelled", lambda *_: None)
    with pytest.raises(Unsolvable, match="read back"):
        mill.quantize(str(model), "tune : int4-g32 > bitmill", tmp_path / "out", calib=tokens())
