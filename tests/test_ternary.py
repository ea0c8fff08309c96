"""Ternary models: the grid, transformers' layout both ways, training that learns, and every way out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import bitnet as theirs

from bitmill import mill
from bitmill.containers._bitnet_read import pack_rows, unpack_rows
from bitmill.core.errors import BadFile, Interrupted, Refused
from bitmill.core.inputs import parse_inputs
from bitmill.core.registry import parse_grid
from bitmill.grids.ternary import Ternary
from bitmill.numerics.inputs import rounded
from bitmill.run.load import load_model
from bitmill.source import open_source
from bitmill.ternary.linear import TernaryLinear
from bitmill.ternary.train import train_ternary
from bitmill.training.settings import Settings
from bitmill.transfer import convert
from tests.cli.command import Command
from tests.tiny import make_model, tokens

QUICK = Settings(steps=20, lr=5e-3, batch=4, context=32, clip=1.0, falls=True, micro_tokens=128)
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}


@pytest.fixture(autouse=True)
def _not_compiled() -> Iterator[None]:
    """transformers compiles its BitNet layers; what they compute is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three four five six seven eight nine ten. " * 80)
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    source = make_model(folder / "source", **WIDE)
    report = train_ternary(str(source), text, folder / "out", settings=QUICK, scratch=True)
    facts = report.tuning
    assert facts["least"] < 0.75 * facts["first"], "it learns"
    assert 0.1 < facts["zeros"] < 0.6
    return folder / "out"


def test_the_grid_is_the_papers_rule() -> None:
    w = 0.02 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    made = Ternary(True).round(w)
    wanted = theirs.WeightQuant.forward(None, w)
    torch.testing.assert_close(made.dense(), wanted, rtol=1e-6, atol=0)
    narrow = Ternary().round(w)
    scale = narrow.params["scale"]
    assert torch.equal(scale, scale.to(torch.bfloat16).float()) and torch.equal(scale, scale.half().float())
    assert set(narrow.codes.unique().tolist()) == {0, 1, 2}
    assert not Ternary().round(torch.zeros(4, 8)).dense().any()
    assert torch.equal(Ternary().round(narrow.dense()).dense(), narrow.dense()), "what is ternary stays"


def test_inputs_are_rounded_as_transformers_does() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0
    assert torch.equal(rounded(parse_inputs("bitnet-int8"), x, {}), theirs.ActQuant.forward(None, x))


def test_rows_are_packed_as_transformers_does() -> None:
    codes = torch.randint(0, 3, (24, 10), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    assert torch.equal(pack_rows(codes), theirs.pack_weights(codes.to(torch.int32) - 1))
    assert torch.equal(unpack_rows(pack_rows(codes)), codes)
    assert torch.equal(theirs.unpack_weights(pack_rows(codes), torch.float32) + 1, codes.float())


def test_a_linear_learns_as_if_nothing_were_rounded() -> None:
    dense = nn.Linear(32, 16)
    layer = TernaryLinear(dense, parse_inputs("bitnet-int8"))
    x = torch.randn(4, 32, requires_grad=True)
    seen = theirs.ActQuant.forward(None, x.detach())
    values = Ternary().round(dense.weight.detach()).dense()
    pull = torch.randn(4, 16)
    layer(x).backward(pull)
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad, pull @ values)
    torch.testing.assert_close(layer.weight.grad, pull.T @ seen)


@pytest.mark.parametrize("linear", ["autobitlinear", "bitlinear"])
def test_transformers_runs_the_folder_and_ours_computes_the_same(
    linear: str, trained: Path, tmp_path: Path
) -> None:
    """Its other layer divides by the scale: the same folder with the reciprocal, which is read as well."""
    folder = trained
    if linear == "bitlinear":
        folder = _edited(trained, tmp_path / "other", {"linear_class": linear}, reciprocal=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kinds = {type(m).__name__ for m in model.modules() if "Bit" in type(m).__name__}
    assert kinds == {"AutoBitLinear" if linear == "autobitlinear" else "BitLinear"}
    ids = tokens(2, 16)
    ours = load_model(open_source(str(folder)))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-3, atol=2e-3)


def _edited(
    folder: Path, out: Path, change: dict[str, Any], *, reciprocal: bool = False, **more: Tensor
) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    if reciprocal:
        tensors = {n: 1 / t if n.endswith("weight_scale") else t for n, t in tensors.items()}
    save_file({**tensors, **more}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_what_is_reported_is_what_the_file_says(trained: Path, text: Path) -> None:
    """The held-out loss, by the file as anybody loads it."""
    report = json.loads((trained / "bitmill-report.json").read_text())
    from bitmill.calibrate.windows import tokenizer_of
    from bitmill.training.lessons import read_lessons

    source = open_source(str(trained))
    model = load_model(source)
    judges = read_lessons(text, tokenizer_of(source), QUICK.context, QUICK.seed).judges
    total = 0.0
    for lesson in judges:
        with torch.no_grad():
            total += float(model(lesson.ids[None], labels=lesson.ids[None]).loss) * lesson.answers
    assert total / sum(j.answers for j in judges) == pytest.approx(report["tuning"]["least"], rel=2e-3)


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0"])
def test_llama_cpps_blocks_hold_the_same_values(kind: str, trained: Path, tmp_path: Path) -> None:
    source = open_source(str(trained))
    mill.quantize(source, f"nearest : {kind}, embed=f32 > gguf", tmp_path / "a.gguf")
    convert(source, f"nearest : {kind}, embed=f32 > gguf", tmp_path / "b.gguf")
    for path in ("a.gguf", "b.gguf"):
        back = open_source(str(tmp_path / path))
        for name in source.tensors:
            stored = back.stored(name)
            if ".mlp." in name or "_proj" in name:
                assert stored is not None and str(stored.grid) == kind
            assert torch.equal(back.read(name).float(), source.read(name).float()), name


def test_straight_into_gguf_is_the_same_model(trained: Path, text: Path, tmp_path: Path) -> None:
    source = str(trained.parent / "source")
    told: dict[str, Any] = {"settings": QUICK, "scratch": True}
    train_ternary(source, text, tmp_path / "out.gguf", **told, recipe="nearest : tq2_0, embed=f32 > gguf")
    back, folder = open_source(str(tmp_path / "out.gguf")), open_source(str(trained))
    assert all(torch.equal(back.read(n).float(), folder.read(n).float()) for n in folder.tensors)


@pytest.mark.parametrize("stop", ["step 8: journaled", "step 14: live written", "weights: journaled"])
def test_a_resumed_training_writes_the_same_bytes(
    stop: str, trained: Path, text: Path, tmp_path: Path
) -> None:
    def boundary(event: str) -> None:
        if event == stop:
            raise KeyboardInterrupt

    source = str(trained.parent / "source")
    told: dict[str, Any] = {"settings": QUICK, "scratch": True}
    with pytest.raises(Interrupted):
        train_ternary(source, text, tmp_path / "out", **told, boundary=boundary)
    report = train_ternary(source, text, tmp_path / "out", **told)
    assert report.resumed
    one, other = (p / "model.safetensors" for p in (trained, tmp_path / "out"))
    assert one.read_bytes() == other.read_bytes()


def test_a_given_model_goes_on_and_another_shape_starts_anew(
    trained: Path, text: Path, tmp_path: Path
) -> None:
    source = str(trained.parent / "source")
    report = train_ternary(source, text, tmp_path / "on", settings=QUICK)
    assert report.tuning["least"] < report.tuning["first"]
    told: dict[str, Any] = {"settings": Settings(**{**vars(QUICK), "steps": 2}), "scratch": True}
    train_ternary(
        source, text, tmp_path / "small", shape="layers=2,hidden=64,mlp=96,heads=2,kv-heads=1", **told
    )
    made = open_source(str(tmp_path / "small"))
    assert made.config["num_hidden_layers"] == 2 and made.config["head_dim"] == 32
    assert made.tensors["model.layers.1.mlp.up_proj.weight"].shape == (96, 64)


def test_hostile_and_foreign_folders_are_refused(trained: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    weights = load_file(trained / "model.safetensors")
    bad = weights[f"{name}.weight"].clone()
    bad[0, 0] = 255
    cases: list[tuple[dict[str, Any], dict[str, Tensor], type[Exception], str]] = [
        ({"use_rms_norm": True}, {}, Refused, "norm stands inside"),
        ({"quantization_mode": "online"}, {}, Refused, "online"),
        ({"linear_class": "odd"}, {}, BadFile, "odd"),
        ({}, {f"{name}.weight": bad}, BadFile, "a code is 3"),
        ({}, {f"{name}.weight_scale": torch.tensor([float("nan")])}, BadFile, "no scale"),
        ({}, {f"{name}.weight_scale": torch.ones(3)}, BadFile, "one number"),
    ]
    for at, (change, more, kind, said) in enumerate(cases):
        folder = _edited(trained, tmp_path / str(at), change, **more)
        with pytest.raises(kind, match=said):
            open_source(str(folder)).read(f"{name}.weight")


def test_refusals_say_what_would_work(trained: Path, text: Path, tmp_path: Path, command: Command) -> None:
    source = trained.parent / "source"
    mixture, solved = make_model(tmp_path / "mixture", "mixtral"), "gptq : ternary-tensor > bitnet"
    for words, reason in (
        ((source, "--data", text, "--shape", "layers=2", "-o", tmp_path / "x"), "--scratch"),
        ((source, "--data", text, "--scratch", "--shape", "depth=2", "-o", tmp_path / "x"), "hidden"),
        ((source, "--data", text, "--recipe", "q4_0", "-o", tmp_path / "x.gguf"), "ternary"),
        (
            (source, "--data", text, "--recipe", solved, "-o", tmp_path / "x"),
            "solver",
        ),
        ((mixture, "--data", text, "-o", tmp_path / "x"), "experts"),
        ((source, "-o", tmp_path / "x"), "--data"),
    ):
        said = command("train-ternary", *words)
        assert said.code == 2 and reason in said.err, said.err
    assert not list(tmp_path.glob("x*"))
    said = command("train-ternary", source, "--data", text, "--context", 32, "--dry-run", "--json")
    assert said.code == 0 and said.json["from"] == "the source's weights"


def test_the_command_trains(trained: Path, text: Path, tmp_path: Path, command: Command) -> None:
    short = ("--context", 32, "--steps", 3, "--batch", 2, "--scratch")
    said = command("train-ternary", trained.parent / "source", "--data", text, *short, "-o", tmp_path / "out")
    assert said.code == 0 and "weights are 0" in said.out and "learning 3/3" in said.err
    grid = parse_grid("ternary-tensor")
    stored = open_source(str(tmp_path / "out")).stored("model.layers.0.mlp.up_proj.weight")
    assert stored is not None and stored.grid == grid
