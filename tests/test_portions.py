"""Portions that shrink where memory runs short: real errors of the allocator, and gradients that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitmill import mill, rotating, tuning
from bitmill.calibrate.stream import Block
from bitmill.calibrate.tokens import Calibration
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Interrupted
from bitmill.core.learning import BlockTask
from bitmill.core.types import Problem
from bitmill.grids.integer import Integer
from bitmill.held_out import HeldOut
from bitmill.numerics.lessons import Course
from bitmill.numerics.portions import Portions, is_short_of_memory
from bitmill.source import open_source
from bitmill.ternary.train import train_ternary
from bitmill.training.pupil import Pupil
from bitmill.training.settings import Settings
from tests.tiny import make_model, tokens


def no_memory() -> None:
    """The allocator's own error: four petabytes."""
    torch.empty(1 << 50)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From now on, memory suffices for so many windows inside a block with derivatives, and not for more."""

    def limit(most: int) -> None:
        whole = Block.outputs

        def outputs(block: Block, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
            if len(hidden) > most:
                no_memory()
            return whole(block, weights, hidden)

        monkeypatch.setattr(Block, "outputs", outputs)

    return limit


def test_what_says_that_memory_is_short() -> None:
    with pytest.raises(RuntimeError) as caught:
        no_memory()
    assert is_short_of_memory(caught.value)
    assert is_short_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_short_of_memory(MemoryError())
    assert is_short_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
    )
    assert not is_short_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_short_of_memory(ValueError("out of memory"))


def test_it_is_halved_for_good_and_said() -> None:
    portions, tried = Portions(12, "windows"), []

    def work(size: int) -> int:
        tried.append(size)
        if size > 3:
            no_memory()
        return size

    assert not portions.notes("here")
    assert portions.through(work, whole=9) == 2 and tried == [12, 4, 2]
    assert portions.through(work, whole=9) == 2 and tried == [12, 4, 2, 2]
    [note] = portions.notes("here")
    assert (note.kind, note.where, note.value) == ("memory", "here", 2) and "2 windows at once" in note.text


def test_the_least_is_refused_and_other_errors_pass() -> None:
    with pytest.raises(Interrupted, match="memory does not suffice to learn from 8 tokens") as caught:
        Portions(64, "tokens").through(lambda _: no_memory(), whole=32, least=8)
    assert "allocate" in str(caught.value.where) and "shorter windows" in str(caught.value.fix)

    def broken(_: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        Portions(64, "tokens").through(broken, whole=32)


def _task(most: int) -> BlockTask:
    """A block of one weight: windows ``17 5 8`` through it; memory suffices for ``most`` at once."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(17, 5, 8, generator=generator), torch.randn(4, 8, generator=generator)

    def outputs(values: Sequence[Tensor], windows: Tensor) -> Tensor:
        if len(windows) > most:
            no_memory()
        return x[windows] @ values[0].T

    return BlockTask("block 0", [Problem("w", "q", w)], [Integer(4, 8)], 17, outputs, (x @ w.T).__getitem__)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_blocks_gradient_is_the_same(most: int) -> None:
    whole, parts = (Course.of_block(_task(n), 7, 0, half=False) for n in (99, most))
    assert parts.first == pytest.approx(whole.first, rel=1e-6)
    for _ in range(3):
        wanted, found = (c.gradients([c.best[0].dense()]) for c in (whole, parts))
        assert wanted is not None and found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert [note.kind for note in parts.notes("block 0", "x")] == ["learned", "memory"]
    assert [note.kind for note in whole.notes("block 0", "x")] == ["learned"]
    with pytest.raises(Interrupted, match="1 windows"):
        Course.of_block(_task(0), 7, 0, half=False)


@pytest.mark.parametrize("solver", ["autoround(steps=3)", "efficientqat(steps=3, rate=0.2)"])
def test_blocks_learn_with_less_memory(
    solver: str, model: Path, narrow: Callable[[int], None], tmp_path: Path
) -> None:
    line, ids = f"{solver} : int2-g32-asym > bitmill", tokens(10, 24)
    whole = mill.quantize(str(model), line, tmp_path / "whole", calib=ids)
    narrow(1)
    parts = mill.quantize(str(model), line, tmp_path / "parts", calib=ids)
    assert "memory" not in {note.kind for note in whole.notes}
    assert [note.where for note in parts.notes if note.kind == "memory"] == ["block 0", "block 1"]
    found = [[n.value for n in r.notes if n.kind == "learned"] for r in (whole, parts)]
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize(
    ("line", "near"),
    [("tune(steps=3)", 2e-3), ("spinquant(steps=3, batch=4) + nearest", 0.05)],  # a code here and there
)
def test_whole_models_learn_with_less_memory(
    line: str,
    near: float,
    model: Path,
    narrow: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def both(calibration: Calibration, _: Checkpoint) -> HeldOut:
        return HeldOut(calibration.tokens, calibration.tokens, {"text": "the same", "windows": 8})

    for module in (tuning, rotating):
        monkeypatch.setattr(module, "held_out", both)
    recipe, ids = f"{line} : int4-g32-asym, input=int8-token > bitmill", tokens(8, 24)
    whole = mill.quantize(str(model), recipe, tmp_path / "whole", calib=ids)
    narrow(1)
    parts = mill.quantize(str(model), recipe, tmp_path / "parts", calib=ids)
    assert "memory" not in {note.kind for note in whole.notes}
    [note] = [note for note in parts.notes if note.kind == "memory"]
    assert "tokens at once" in note.text and note.value is not None and 24 <= note.value < 48
    ours, theirs = (open_source(str(tmp_path / name)) for name in ("parts", "whole"))
    for name in theirs.tensors:
        one, other = ours.read(name).float(), theirs.read(name).float()
        assert float((one - other).norm()) <= near * float(other.norm()), name
    narrow(0)
    with pytest.raises(Interrupted, match="24 tokens"):
        mill.quantize(str(model), recipe, tmp_path / "none", calib=ids)
    assert not (tmp_path / "none").exists()


def test_training_with_less_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 40)
    settings = Settings(steps=3, lr=5e-3, batch=4, context=32, micro_tokens=128)
    source = make_model(tmp_path / "source", hidden_size=256, num_hidden_layers=1, head_dim=64)
    whole = train_ternary(str(source), text, tmp_path / "whole", settings=settings)
    loss = Pupil._loss

    def short(pupil: Pupil, ids: Tensor, counts: Tensor) -> Tensor:
        made = loss(pupil, ids, counts)
        if len(ids) > 1:
            made.sum().backward() if made.requires_grad else None  # what a failed try leaves behind
            no_memory()
        return made

    monkeypatch.setattr(Pupil, "_loss", short)
    parts = train_ternary(str(source), text, tmp_path / "parts", settings=settings)
    assert [note.kind for note in parts.notes if note.kind == "memory"] == ["memory"]
    for one, other in zip(parts.tuning["trace"], whole.tuning["trace"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
