"""Rotations that are learned, before the walk folds them: the model with rounded inputs and a rounded cache,
as a function of the rotations that stand before the rounding.

Weights are as they were and everything is computed in the model's own basis: ``x`` becomes ``Q(x R) Rᵀ``,
which is what a model computes whose weights have ``R`` folded in. Derivatives go through ``Q`` as if it were
not there (Bengio et al., arXiv 1308.3432). A block at a time is in memory where the model is large.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitmill.account import Report
from bitmill.calibrate.head import divergence
from bitmill.calibrate.stream import Block, Stream
from bitmill.core.axes import LinearMap
from bitmill.core.rotating import LearnedTransform, RotationTask
from bitmill.core.schooling import Schooling
from bitmill.core.types import Inputs, Note, Row
from bitmill.folding import FixedFold, places
from bitmill.folding_plan import KEPT_BYTES
from bitmill.held_out import HeldOut, held_out
from bitmill.numerics.cache import KEYS
from bitmill.numerics.cayley import turned
from bitmill.numerics.inputs import straight
from bitmill.numerics.linear_maps import Diagonal, Hadamard, Orthogonal
from bitmill.numerics.portions import Portions
from bitmill.tuning import BesideWalk, Tuning
from bitmill.walk import Walk

UNIT = "rotate"
LAST = "rotate: found"
MICRO_TOKENS = 2048  # tokens inside a block at once
T = TypeVar("T")

Rotations = Mapping[str, Tensor]
"""Blocks ``m n n`` by place: ``residual``, ``value.3``."""


@dataclass
class Rotating(BesideWalk):
    """The step before a walk that learns its rotations; the walk folds them.

    Attributes:
        job: the walk, or the walk and what comes after it.
        transform: that learns.
    """

    job: Walk | Tuning
    transform: LearnedTransform

    def run(self, identity: Mapping[str, Any], done: Sequence[Mapping[str, Any]], started: float) -> Report:
        """Every unit that is not done yet; the report of all of them."""
        mine = [unit for unit in done if unit["unit"].startswith(UNIT)]
        rotations, facts = self._learned(mine)
        self.walk.learned({place: _map(blocks) for place, blocks in rotations.items()})
        report = self.job.run(identity, done[len(mine) :], started)
        name = next(str(c) for c in self.walk.plan.recipe.transforms if c.name == facts["name"])
        return replace(report, notes=(*_notes(facts, name), *report.notes), resumed=len(done))

    def _learned(self, done: Sequence[Mapping[str, Any]]) -> tuple[Rotations, Mapping[str, Any]]:
        if done and done[-1]["unit"] == LAST:
            return self.space.load_live(done[-1]["live"]), done[-1]["rotations"]
        began, kept = time.monotonic(), done[-1] if done else None
        held = held_out(self.walk.calibration, self.walk.source)
        widths = places(self.walk.plan.family, (self.transform,), self.walk.source)
        model = _Rounded(self.walk, held, self.transform.distils, "residual" in widths)

        def keep(step: int, state: Rotations, record: Mapping[str, Any]) -> None:
            self.space.finish_unit(f"{UNIT} {step}", {"step": step, "record": record}, _cpu(state))

        school = Schooling(
            len(held.taught),
            model.lesson,
            model.judge,
            0 if kept is None else int(kept["step"]),
            {} if kept is None else self.space.load_live(kept["live"]),
            {} if kept is None else kept["record"],
            keep,
            lambda step, text: self.tell("rotate", step, self.transform.passes, text),
        )
        self.tell("rotate", school.step, self.transform.passes, "")
        found = self.transform.learn(RotationTask(widths, school))
        call = self._call()
        short = [vars(note) for note in model.portions.notes(call)]
        told = {"name": call, "judge": held.facts, "seconds": time.monotonic() - began, "memory": short}
        facts = {**found.facts, **told}
        self.space.finish_unit(LAST, {"rotations": facts}, _cpu(found.rotations), lasting=True)
        return found.rotations, facts

    def _call(self) -> str:
        recipe = self.walk.plan.recipe
        made = zip(recipe.transforms, recipe.make_transforms(), strict=True)
        return next(call.name for call, transform in made if transform == self.transform)


def with_rotating(walk: Walk, job: Walk | Tuning) -> Walk | Tuning | Rotating:
    """The walk, and what its recipe says comes before it."""
    learn = [t for t in walk.plan.recipe.make_transforms() if isinstance(t, LearnedTransform)]
    return Rotating(walk, job, learn[0]) if learn else job


class _Rounded:
    """The model of a plan, its weights not rounded yet, as a function of rotations.

    Args:
        distils: whether the loss is the divergence from the original.
        streams: whether the residual stream is rotated: norms are then in what reads them.
    """

    def __init__(self, walk: Walk, held: HeldOut, distils: bool, streams: bool) -> None:
        self._plan, self._held = walk.plan, held
        self.portions = Portions(MICRO_TOKENS, "tokens")
        source = walk.source
        unit = Diagonal(torch.ones(int(source.config["hidden_size"]))) if streams else None
        fold = FixedFold(walk.plan.family, unit, {}, tied=False, shared=False, values=0)
        norms = partial(_folded, fold, source.read)
        self._plain = Stream(source, walk.device, inputs={})
        self._stream = Stream(source, walk.device, read=norms, inputs={})
        self._head = self._plain.head()
        self._now: Mapping[str, Tensor] = {}
        size = 4 * sum(torch.Size(t.shape).numel() for n, t in source.tensors.items() if ".layers." in n)
        self._blocks: dict[int, Block] | None = {} if size < KEPT_BYTES else None
        self._wanted = self._original() if distils else None

    def lesson(self, rotations: Rotations, windows: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Loss over taught windows, and its derivatives by the entries of the rotations."""
        return self._through(partial(self._lesson, rotations, windows), self._held.taught[windows])

    def _lesson(self, rotations: Rotations, windows: Tensor, size: int) -> tuple[float, dict[str, Tensor]]:
        """With so many tokens inside a block at once."""
        inputs: list[Tensor] = []
        hidden = self._up(self._held.taught[windows], rotations, inputs, size)
        loss, gradient = self._top(hidden, windows)
        sums = {name: torch.zeros_like(value) for name, value in rotations.items()}
        for block in self._backwards():
            gradient = self._down(block, rotations, inputs.pop(), gradient, sums, size)
        return loss, sums

    def judge(self, rotations: Rotations) -> float:
        """Loss over the windows that judge."""
        judges, total = self._held.judges, 0.0
        hidden = self._through(partial(self._up, judges, rotations, None), judges)
        for at, tokens in enumerate(judges):
            wanted = None if self._wanted is None else self._wanted[len(self._held.taught) + at]
            with torch.no_grad():
                total += float(self._loss(hidden[at], tokens, wanted))
        return total / len(judges)

    def _original(self) -> Tensor:
        """Hidden states of the model as it is, of the windows that teach and of those that judge."""
        tokens = torch.cat([self._held.taught, self._held.judges])
        length = tokens.shape[1]
        return self._through(lambda size: self._plain.hidden(tokens, max(1, size // length)), tokens)

    def _loss(self, hidden: Tensor, tokens: Tensor, wanted: Tensor | None) -> Tensor:
        ours = self._head.logits(hidden[:-1])
        if wanted is None:
            return nn.functional.cross_entropy(ours, tokens[1:].to(ours.device))
        with torch.no_grad():
            theirs = self._head.logits(wanted[:-1].to(ours.device))
        return divergence(theirs, ours).mean()

    def _through(self, work: Callable[[int], T], tokens: Tensor) -> T:
        return self.portions.through(work, tokens.numel(), tokens.shape[1])

    def _up(self, tokens: Tensor, rotations: Rotations, inputs: list[Tensor] | None, size: int) -> Tensor:
        hidden, self._now = self._plain.embed(tokens), rotations
        for index in range(self._stream.layers):
            if inputs is not None:
                inputs.append(hidden)
            block = self._block(index)
            hidden = torch.cat([block.forward(part) for part in _parts(hidden, size)])
        return hidden

    def _top(self, hidden: Tensor, windows: Tensor) -> tuple[float, Tensor]:
        gradient, total = torch.zeros_like(hidden), 0.0
        for at, window in enumerate(windows.tolist()):
            x = hidden[at].detach().requires_grad_()
            wanted = None if self._wanted is None else self._wanted[window]
            with torch.enable_grad():
                loss = self._loss(x, self._held.taught[window], wanted) / len(windows)
            gradient[at] = torch.autograd.grad(loss, x)[0]
            total += float(loss.detach())
        return total, gradient

    def _down(
        self,
        block: Block,
        rotations: Rotations,
        inputs: Tensor,
        gradient: Tensor,
        sums: dict[str, Tensor],
        size: int,
    ) -> Tensor:
        """Derivatives by a block's input; those by rotations are added to ``sums``."""
        names = [n for n in rotations if n in ("residual", f"value.{block.index}")]
        leaves = {name: rotations[name].float().requires_grad_() for name in names}
        self._now, before = leaves, []
        for x, pull in zip(_parts(inputs, size), _parts(gradient, size), strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                out = block.outputs({}, x)
            found = torch.autograd.grad(out, [x, *leaves.values()], pull, allow_unused=True)
            before.append(torch.zeros_like(x) if found[0] is None else found[0])
            for name, part in zip(names, found[1:], strict=True):
                if part is not None:
                    sums[name] += part.to(sums[name])
        return torch.cat(before)

    def _backwards(self) -> Iterator[Block]:
        return (self._block(index) for index in reversed(range(self._stream.layers)))

    def _block(self, index: int) -> Block:
        if self._blocks is not None and index in self._blocks:
            return self._blocks[index]
        block = self._stream.block(index)
        linears = block.linears()
        keys: dict[str, dict[str, Row]] = {}
        for row in self._plan.rows:
            if row.layer != index:
                continue
            path = row.name.removeprefix(block.prefix)
            if row.inputs is not None:
                change = partial(self._seen, Inputs(row.inputs), self._basis(row))
                linears[path.removesuffix(".weight")].register_forward_pre_hook(_hook(change))
            if row.cache is not None:
                attention, _, part = path.rpartition(".")
                keys.setdefault(attention, {})[part] = row
        for path, rows in keys.items():
            block.watch_cache(path, partial(self._cached, rows))
        if self._blocks is not None:
            self._blocks[index] = block
        return block

    def _cached(self, rows: Mapping[str, Row], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for part, row in rows.items():
            assert row.cache is not None
            how, basis = Inputs(row.cache), self._basis(row)
            if part == KEYS:
                keys = self._seen(how, basis, keys)
            else:
                values = self._seen(how, basis, values)
        return keys, values

    def _basis(self, row: Row) -> str | Hadamard:
        """The place whose rotation stands before the rounding of a row's inputs, or the runtime's own; a
        place that is not there stands for none."""
        if row.turn:
            return Hadamard.plain(row.turn)
        if row.cache is not None:
            return "" if row.name.endswith(KEYS) else f"value.{row.layer}"
        return f"value.{row.layer}" if row.role == "o" else "" if row.role == "down" else "residual"

    def _seen(self, how: Inputs, basis: str | Hadamard, x: Tensor) -> Tensor:
        if isinstance(basis, Hadamard):
            return basis.turn_back(straight(how, basis.turn(x)))
        rotation = self._now.get(basis)
        if rotation is None:
            return straight(how, x)
        return turned(straight(how, turned(x, rotation)), rotation.mT)


def _hook(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _, args: (change(args[0]), *args[1:])


def _folded(fold: FixedFold, read: Callable[[str], Tensor], name: str) -> Tensor:
    """A tensor of a model whose norms' weights are in what reads them."""
    return fold.apply(name, read(name), read)


def _map(blocks: Tensor) -> LinearMap:
    return Orthogonal(torch.block_diag(*blocks))


def _notes(facts: Mapping[str, Any], name: str) -> tuple[Note, ...]:
    first, last = facts["first"], facts["last"]
    text = f"loss on {facts['judge']['text']} {first:.4f} -> {last:.4f}"
    text += "; no better: the random rotations stay" if facts["kept"] else ""
    short = (Note(**note) for note in facts.get("memory", ()))
    return Note("rotations", name, text, last / first if first else None), *short


def _cpu(tensors: Rotations) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _parts(hidden: Tensor, size: int) -> tuple[Tensor, ...]:
    return hidden.split(max(1, size // hidden.shape[1]))
