"""LLM-QAT: its loss, derivatives and steps against a slow and obvious network; parts of a model; its text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bitmill import mill, tuning, tuning_plan
from bitmill.calibrate import sample
from bitmill.calibrate.tokens import Calibration, calibration_tokens
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadRecipe, Interrupted, Refused
from bitmill.distilled import Distilled
from bitmill.held_out import HeldOut
from bitmill.journal import Workspace
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from bitmill.solvers.llmqat import LlmQat
from bitmill.source import open_source
from bitmill.walk import Walk
from tests.tiny import make_model, tokens

LINE = "llmqat({}) : int4-channel-sym, input=int8-token, cache=int4-token-asym > bitmill"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows that teach judge, too: what a random model says of one text tells nothing of another."""

    def both(calibration: Calibration, _: Checkpoint) -> HeldOut:
        return HeldOut(calibration.tokens, calibration.tokens, {"text": "the same", "windows": 1})

    monkeypatch.setattr(tuning, "held_out", both)


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def weight_of(w: Tensor) -> Tensor:
    """Symmetric, the largest of a row at the end of its range, nothing clipped; scales as a float16 holds
    them."""
    scale = (w.detach().abs().amax(1, keepdim=True) / 7.5).half().float()
    return straight(w, (w / scale).round().clamp(-8, 7) * scale)


def input_of(x: Tensor) -> Tensor:
    """Eight bits, a scale a token."""
    scale = x.detach().abs().amax(-1, keepdim=True) / 127.5
    return straight(x, (x / scale).clamp(-128, 127).round() * scale)


def cached(x: Tensor) -> Tensor:
    """Four bits with a zero point, for each token's head."""
    low, high = (f(-1, keepdim=True).clamp(**at) for f, at in ((x.amin, {"max": 0}), (x.amax, {"min": 0})))
    scale = ((high - low) / 15).detach()
    zero = (-8 - low.detach() / scale).clamp(-8, 7).round()
    return straight(x, ((x / scale + zero).clamp(-8, 7).round() - zero) * scale)


class RoundingCache(DynamicCache):
    """transformers' own, which rounds what goes into it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(cached(key_states), cached(value_states), *args, **kwargs)


class Network:
    """The whole model as transformers has it, everything rounded by hand, and left to autograd."""

    def __init__(self, source: Checkpoint) -> None:
        self.teacher, self.student = load_model(source), load_model(source)
        for path, linear in self.student.named_modules():
            if isinstance(linear, nn.Linear) and ".layers." in path:
                linear.register_forward_pre_hook(lambda _, args: (input_of(args[0]),))

    def loss(self, leaves: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Divergence behind the first half of each window."""
        named = {n: weight_of(v) if v.dim() == 2 else v for n, v in leaves.items()}
        half = ids.shape[1] // 2
        with torch.no_grad():
            theirs = torch.log_softmax(self.teacher(ids).logits[:, half:], -1)
        past = {"past_key_values": RoundingCache(), "use_cache": True}
        logits = torch.func.functional_call(self.student, named, (ids,), past).logits[:, half:]
        return (theirs.exp() * (theirs - torch.log_softmax(logits, -1))).sum(-1).mean()


def _walked(source: Checkpoint, out: Path, recipe: str, ids: Tensor) -> Walk:
    made = plan(parse(recipe), source, out, nsamples=len(ids), seqlen=ids.shape[1])
    space = Workspace(out, made.files, not made.files[0].path)
    walk = Walk(made, source, space, lambda *_: None, Calibration(ids), {}, "cpu", False)
    space.open({}, False)
    walk.run({}, [], 0.0)
    return walk


def test_loss_and_derivatives_are_those_of_a_network_rounded_by_hand(model: Path, tmp_path: Path) -> None:
    source, ids = open_source(str(model)), tokens(3, 24)
    ours = Distilled(_walked(source, tmp_path / "out", LINE.format(""), ids), LlmQat(), range(2))
    start, units = ours.start()
    assert len(start) == 2 * 7 + 2 * 2 + 1  # linears, norms inside the blocks, the one behind them
    original = tuning.Stream(source).head()
    loss, found = ours.lesson(ids, ours.wanted(ids), original, ours.stored(start))
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    wanted = Network(source).loss(leaves, ids)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert found.keys() == start.keys()
    for name, slope in found.items():
        grad = leaves[name].grad
        assert grad is not None
        expected = grad * units[name]
        assert float((slope - expected).norm()) < 2e-3 * float(expected.norm()), name


@pytest.mark.usefixtures("same_text")
def test_steps_are_those_of_adam_on_that_network(model: Path, tmp_path: Path) -> None:
    """Weights after a few steps, up to the few that a sum in another order sends to the next code."""
    source, ids, steps, rate = open_source(str(model)), tokens(4, 24), 4, 0.01
    options = f"steps={steps}, rate={rate}, batch=4, norms=false"
    report = mill.quantize(source, LINE.format(options), tmp_path / "out", calib=ids)
    assert report.tuning["best_step"] == steps and report.tuning["least"] < report.tuning["first"]
    network, layers = Network(source), source.tensors
    start = {n: source.read(n).float() for n, t in layers.items() if ".layers." in n and len(t.shape) == 2}
    unit = {n: (v.abs().amax(1, keepdim=True) / 7.5).half().float() for n, v in start.items()}
    now = {n: v.clone() for n, v in start.items()}
    mean, square = ({n: torch.zeros_like(v) for n, v in start.items()} for _ in range(2))
    for step in range(steps):
        leaves = {n: v.clone().requires_grad_() for n, v in now.items()}
        network.loss(leaves, ids).backward()
        high = rate * (1 + torch.cos(torch.tensor(torch.pi * step / steps))) / 2
        for name, leaf in leaves.items():
            gradient = leaf.grad * unit[name]  # type: ignore[operator]
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.99 * square[name] + 0.01 * gradient**2
            way = mean[name] / (1 - 0.9 ** (step + 1)) / (square[name] / (1 - 0.99 ** (step + 1))).sqrt()
            now[name] -= high * unit[name] * way.nan_to_num()
    made = open_source(str(tmp_path / "out"))
    for name, value in now.items():
        ours, theirs = made.read(name).float(), weight_of(value)
        other, moved = (
            float(((ours - there).abs() > 0.5 * unit[name]).float().mean())
            for there in (theirs, weight_of(start[name]))
        )
        assert other < 0.1 * moved and moved > 0.005, name


@pytest.mark.usefixtures("same_text")
@pytest.mark.parametrize("line", [
    "llmqat(steps=3, rate=0.01) : int4-channel-sym, input=int8-token > compressed-tensors",
    "hadamard + llmqat(steps=3, rate=0.01) : int4-g32-sym, input=int4-token, cache=int8-token > bitmill",
    "llmqat(steps=3, rate=0.01) : q4_0 > gguf",
    "llmqat(steps=3, rate=0.01) : nf4-b64 > bitsandbytes",
])  # fmt: skip
def test_it_goes_with_the_other_axes(line: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out.gguf" if line.endswith("gguf") else "out")
    report = mill.quantize(str(model), line, out, calib=tokens(6, 24))
    assert report.tuning["least"] < report.tuning["first"]
    made = open_source(str(out))
    assert all(torch.isfinite(made.read(name).float()).all() for name in made.tensors)


@pytest.mark.usefixtures("same_text")
@pytest.mark.parametrize("stop", ["tune blocks 0 to 0 3: journaled", "tune blocks 1 to 1: found: journaled"])
def test_parts_learn_one_after_the_other_and_resume(stop: str, model: Path, tmp_path: Path) -> None:
    line, ids = "llmqat(steps=3, rate=0.02, blocks=1) : int3-g32-asym > gptq(version=2)", tokens(6, 24)
    whole = mill.quantize(str(model), line, tmp_path / "whole", calib=ids)
    parts = whole.tuning["parts"]
    assert len(parts) == 2 and parts[0]["least"] < parts[0]["first"]
    assert parts[1]["first"] == pytest.approx(parts[0]["least"], rel=1e-4)
    assert whole.tuning["first"] == parts[0]["first"] and whole.tuning["least"] == parts[1]["least"]
    assert [part["weights"] for part in parts] == [parts[0]["weights"]] * 2

    def boundary(event: str) -> None:
        if event == stop.replace(" 3:", " 2:"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        mill.quantize(str(model), line, tmp_path / "parts", calib=ids, boundary=boundary)
    assert mill.quantize(str(model), line, tmp_path / "parts", calib=ids).resumed > 3
    ours, theirs = (open_source(str(tmp_path / name)) for name in ("parts", "whole"))
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.tensors)


def test_memory_decides_how_many_blocks_and_the_plan_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(model))
    whole = plan(parse(LINE.format("steps=7")), source)
    assert str(whole.recipe) == f"nearest + {LINE.format('steps=7')}"
    assert any("the whole model learns at once" in said for said in whole.remarks)
    assert any("what the model itself writes" in said for said in whole.remarks)
    monkeypatch.setattr(tuning_plan, "whole_bytes", lambda: 1 << 20)
    some = plan(parse(LINE.format("steps=7")), source)
    assert str(some.recipe) == f"nearest + {LINE.format('steps=7, blocks=1')}"
    assert some.digest != whole.digest
    assert any("1 of 2 blocks learn at once, one lot after the other" in said for said in some.remarks)
    assert some.peak_bytes < whole.peak_bytes and some.seconds > whole.seconds
    asked = plan(parse(LINE.format("blocks=2")), source)
    assert any("as asked" in said for said in asked.remarks)


@pytest.mark.usefixtures("same_text")
def test_its_text_is_the_models_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sample, "DOCUMENT", 48)
    line = "llmqat(steps=1) : int4-channel-sym > bitmill"
    report = mill.quantize(str(model), line, tmp_path / "out", nsamples=4, seqlen=16)
    [said] = report.calibration["sources"]
    assert said["kind"] == "sampled" and said["windows"] == 4
    other = tmp_path / "other.txt"
    other.write_text("one two three four five six seven eight nine ten. " * 20)
    how: dict[str, Any] = {"nsamples": 6, "seqlen": 16, "seed": 0, "chat": False}
    named = ["self=2", str(other)]
    drawn = calibration_tokens(open_source(str(model)), named, **how, progress=lambda *_: None)
    assert [(s["kind"], s["windows"]) for s in drawn.facts["sources"]] == [("sampled", 4), ("text", 2)]


class Mild:
    """A model that knows one likeliest token, and means little by it."""

    device = torch.device("cpu")

    def __call__(self, ids: Tensor, **_: Any) -> Any:
        logits = torch.zeros(len(ids), 1, 50)
        logits[..., 7] = 0.1
        return SimpleNamespace(logits=logits)


def test_own_text_begins_with_the_likeliest_tokens() -> None:
    prompt, network = torch.full((3, 2), 3), cast(PreTrainedModel, Mild())
    for sure in (0, 4):
        rng = torch.Generator().manual_seed(0)
        ids = sample._continued(network, prompt, 50, rng, sure, lambda _: None)[:, 2:]
        assert (ids[:, :sure] == 7).all()
        assert (ids[:, sure:] == 7).float().mean() < 0.1


@pytest.mark.parametrize(("line", "said"), [
    ("llmqat : e8p > bitmill", "no steps to train by"),
    ("llmqat : nvfp4, dtype=bf16 > compressed-tensors", "use efficientqat"),
    ("gptq + llmqat : int4-g32 > bitmill", "would be lost"),
    ("awq + llmqat : int4-g32 > bitmill", "hadamard or spinquant"),
    ("llmqat : int4-g32, cache=int8-head > bitmill", "cache=int8-token"),
    ("llmqat(steps=0) : int4-g32 > bitmill", "teach nothing"),
    ("llmqat(rate=2) : int4-g32 > bitmill", "rate is a part"),
    ("llmqat(blocks=-1) : int4-g32 > bitmill", "cannot learn"),
    ("llmqat + tune : int4-g32 > bitmill", "enough"),
])  # fmt: skip
def test_refusals(line: str, said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises((Refused, BadRecipe), match=said):
        mill.quantize(str(model), line, tmp_path / "out", calib=tokens())
    assert not list(tmp_path.iterdir())


def test_too_little_memory_names_fewer_blocks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "available_bytes", lambda: 1 << 20)
    with pytest.raises(Refused, match=r"llmqat\(blocks=1\)"):
        mill.quantize(str(model), "llmqat : int4-g32 > bitmill", tmp_path / "out", calib=tokens())
