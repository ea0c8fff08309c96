"""The walk over the blocks: fold the transforms, solve, lay out, journal, go on.

Two ways to walk a calibrated block, chosen by memory alone. *Staged*: every calibration token is inside the
block at once, in micro-batches that wait for each other, and each group of linears is solved the moment its
input exists, so that later groups see the error of earlier ones and the block runs a single time; a fitted
transform takes the moments of the whole block first, from some of the tokens. *Two passes*: moments of the
dense block in micro-batches, solve, then the quantized block's outputs; also for a solver that is not
``sequential``. Where a solver asks for cross moments, the original model's hidden states go along beside the
quantized one's. So they do for a solver that learns from the output of a block, which has it as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitmill.account import Report
from bitmill.calibrate.allocator import freed_memory_kept
from bitmill.calibrate.moments import MomentSum
from bitmill.calibrate.stage import Stage
from bitmill.calibrate.stream import Block, Stream, Twin
from bitmill.calibrate.tokens import Calibration
from bitmill.core.axes import CalibratedSolver, Checkpoint, Container
from bitmill.core.errors import Refused, Unsolvable
from bitmill.core.experts import parse_experts
from bitmill.core.learning import BlockSolver, BlockTask
from bitmill.core.types import Inputs, Moments, Note, Row
from bitmill.fitting import Fitting
from bitmill.folding import Maps, fixed_fold
from bitmill.forecast import MICRO_TOKENS, STAGED_BYTES, blocks_between, staged_bytes
from bitmill.inputs import fixed_by, needs_zero
from bitmill.journal import Workspace
from bitmill.numerics.floats import all_finite
from bitmill.numerics.linear_maps import Hadamard
from bitmill.placing import Placing, unturned
from bitmill.planning import Plan

Progress = Callable[[str, int, int, str], None]
CHUNK = 1 << 24  # weights converted to float32 at a time outside the blocks: 64 MiB
STEP_TOKENS = 2048  # tokens of a micro-batch where all go in step: temporaries of a few MB stay in cache
EXPLOSION = 10.0  # a block whose output error is ten times its own contribution has stopped being that block


@dataclass
class Walk:
    """The state of one run: everything a block needs, and what has been found out so far."""

    plan: Plan
    source: Checkpoint
    space: Workspace
    tell: Progress
    calibration: Calibration
    known: Mapping[str, Moments]
    device: str
    keep_moments: bool
    notes: list[Note] = field(default_factory=list)
    blocks: dict[str, float] = field(default_factory=dict)
    kept_moments: dict[str, Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        solver = self.plan.recipe.make_solver()
        self.placing = Placing(self.plan, self.source, self.space, solver, self.notes)
        told = solver if isinstance(solver, CalibratedSolver) else None
        self._sequential, self._cross = (True, False) if told is None else (told.sequential, told.cross)
        self._learns = solver if isinstance(solver, BlockSolver) else None
        self._along = self._cross or self._learns is not None
        self._original: Tensor | None = None  # hidden states of the model as it was, where they go along
        self.container: Container = self.plan.container
        transforms = self.plan.recipe.make_transforms()
        self.fold = fixed_fold(self.plan.family, transforms, self.source)
        named = zip((call.name for call in self.plan.recipe.transforms), transforms, strict=True)
        fitted = tuple((name, t) for name, t in named if t.needs != "nothing")
        self.fitting = Fitting(self.plan.family, self.source.config, fitted)
        self.notes += self.calibration.notes

    def learned(self, maps: Maps) -> None:
        """Fold these maps, where the recipe's transforms have them learned."""
        transforms = self.plan.recipe.make_transforms()
        self.fold = fixed_fold(self.plan.family, transforms, self.source, maps)

    def run(self, identity: Mapping[str, Any], done: Sequence[Mapping[str, Any]], started: float) -> Report:
        """Every unit that is not done yet; the report of all of them."""
        layers = sorted({row.layer for row in self.plan.rows if row.layer is not None})
        if self._forward_needed and len(done) <= len(layers):
            done = self.space.with_activations(done)
        for record in done:
            self._recall(record)
        if done:
            self.tell("resume", len(done), len(done), f"{len(done)} finished units taken over")
        if not done:
            self._outside(layers)
        hidden = self._hidden_so_far(done)
        stream = self._stream() if self._forward_needed and layers else None
        with freed_memory_kept() if stream is not None else nullcontext():
            for index in layers[max(len(done) - 1, 0) :]:
                self.tell("block", index, len(layers), f"block {index}")
                before = len(self.notes)
                if stream is not None and hidden is None:
                    hidden = stream.embed(self.calibration.tokens)
                    self._original = hidden.clone() if self._along else None
                hidden = self._block(index, stream, hidden)
                kept = index + 1 < len(layers) and self._worth_keeping(index, hidden)
                self._journal(f"block {index}", before, hidden if kept else None)
                self.tell("block", index + 1, len(layers), self._block_line(index))
        return Report(
            path=str(self.space.out),
            plan=self.plan.to_json(),
            calibration=self.calibration.facts,
            notes=tuple(self.notes),
            tensors=self.placing.tensors,
            blocks=self.blocks,
            seconds=time.monotonic() - started,
            resumed=len(done),
            identity=identity,
        )

    def verify_sample(self) -> None:
        """See :meth:`Placing.verify_sample`."""
        self.placing.verify_sample()

    @property
    def _forward_needed(self) -> bool:
        return self.plan.needs != "nothing" and not self.known

    def _stream(self) -> Stream:
        shown = (parse_experts(self.plan.recipe.experts or "route"), self.calibration.tokens.numel())
        return Stream(self.source, self.device, read=self.read, inputs={}, experts=shown)

    def read(self, name: str) -> Tensor:
        """A dense tensor of the source after the fixed maps; refuses non-finite weights."""
        raw = self.source.read(self.fold.source_name(name))
        if not all_finite(raw):
            bad = int((~torch.isfinite(raw.float())).sum())
            raise Refused(
                f"{bad} of {raw.numel()} weights are NaN or infinite",
                where=f"{name} in {self.source.path}",
                fix="the source is damaged: fetch or export it again",
            )
        return self.fold.apply(name, raw, self.source.read)

    def _outside(self, layers: Sequence[int]) -> None:
        """Embedding, head and final norm: rounded row by row, so that a large vocabulary costs 64 MiB."""
        before = len(self.notes)
        for row in self.plan.rows:
            if row.layer is None:
                self._write_by_rows(row)
        self.tell("block", 0, len(layers), "embedding and head")
        self._journal("outside", before, None)

    def _write_by_rows(self, row: Row) -> None:
        slots = self.container.slots(row, self.source)
        raw = self.source.read(self.fold.source_name(row.name))
        importance = self.known[row.name].importance if row.name in self.known else None
        whole = len(row.shape) == 1 or len(slots) != 1 or row.grid.block[0] != 1
        step = row.shape[0] if whole else max(32, CHUNK // row.shape[-1] // 32 * 32)
        at = 0
        for a in range(0, row.shape[0], step):
            part = raw[a : a + step]
            if not all_finite(part):
                self.read(row.name)  # raises with the count
            part = self.fold.apply(row.name, part, self.source.read)
            quantized = row.grid.round(part.float(), importance)
            piece = replace(row, shape=(part.shape[0], *row.shape[1:]))
            for slot, data in self.container.pack(piece, quantized, self.source).items():
                self.space.write(slot, data, at if not whole else 0)
                at += len(data)

    def _block(self, index: int, stream: Stream | None, hidden: Tensor | None) -> Tensor | None:
        rows = [row for row in self.plan.rows if row.layer == index and row.cache is None]
        if stream is None and not self.known:
            for row in rows:
                self._solve_alone(row)
            return None
        tensors = {row.name: self.read(row.name).float() for row in rows}
        if stream is None or hidden is None:
            self._solve_known(index, rows, tensors)
            return None
        block = stream.block(index, read=tensors.__getitem__)
        if self._learns is None and not (self._sequential and self.fits_staged(hidden)):
            return self._two_passes(block, rows, tensors, hidden)
        if self.fitting.transforms:
            groups = self._groups(block, rows, hidden)
            some = self._gather(block, groups, self.fitting.sample(hidden))
            if self.keep_moments:
                self._keep(self._gather(block, groups, hidden))
            self._fold(block, rows, tensors, some, hidden)
            block = stream.block(index, read=tensors.__getitem__)
        if self._learns is not None:
            return self._learned(block, self._learns, rows, tensors, hidden)
        twin = stream.block(index, read=tensors.__getitem__) if self._cross else None
        return self._staged(block, rows, tensors, hidden, twin)

    def fits_staged(self, hidden: Tensor) -> bool:
        """Whether all calibration tokens may be inside one block at once."""
        tokens = hidden.shape[0] * hidden.shape[1]
        return staged_bytes(self.source.config, tokens) * (1 + self._cross) <= STAGED_BYTES

    def _solve_alone(self, row: Row) -> None:
        weight = self.read(row.name)
        if not row.solved:
            self.placing.write(row, row.grid.round(weight.float()))
            return
        self.placing.solve([row], {row.name: weight.float()}, None)

    def _solve_known(self, index: int, rows: Sequence[Row], tensors: dict[str, Tensor]) -> None:
        solved = [row for row in rows if row.solved]
        moments = {row.name: self.known[row.name] for row in solved if row.name in self.known}
        moments, notes = self.fitting.fold(index, rows, tensors, moments)
        self.notes += notes
        groups: dict[int, list[Row]] = {}
        for row in solved:
            groups.setdefault(id(moments.get(row.name, row)), []).append(row)  # without data: by itself
        for group in groups.values():
            told = moments.get(group[0].name)
            self.placing.solve(group, tensors, told)
            for row in group:
                self.placing.count(row, told.tokens if told is not None else 0)
        self.placing.write_kept(rows, tensors)

    def _two_passes(
        self, block: Block, rows: Sequence[Row], tensors: dict[str, Tensor], hidden: Tensor
    ) -> Tensor:
        batch = max(1, MICRO_TOKENS // hidden.shape[1])
        before = block.forward(hidden[:1])
        groups = self._groups(block, rows, hidden)
        moments = self._gather(block, groups, hidden, self._original)
        self._keep(moments)
        moments = self._fold(block, rows, tensors, moments, hidden)
        for group in groups:
            self._place(block, group, tensors, moments[group[0].name])
        for row in rows:
            if not row.solved:
                block.assign(row.name.removeprefix(block.prefix), tensors[row.name])
        self.placing.write_kept(rows, tensors)
        cache = self.placing.watch_cache(block)
        for a in range(0, hidden.shape[0], batch):
            after = block.forward(hidden[a : a + batch])
            if a == 0:
                self._canary(block.index, hidden[:1], before, after[:1])
            hidden[a : a + batch] = after
        self.placing.write_cache(cache)
        return hidden

    @torch.no_grad()
    def _staged(
        self,
        block: Block,
        rows: Sequence[Row],
        tensors: dict[str, Tensor],
        hidden: Tensor,
        original: Block | None,
    ) -> Tensor:
        first = hidden[:1].clone()
        before = block.forward(first)

        def solve(group: Sequence[Row], moments: Moments) -> None:
            if not self.fitting.transforms:  # what is kept is of the model before any fold
                self._keep({row.name: moments for row in group})
            self._place(block, group, tensors, moments)

        groups, batch = self._groups(block, rows, hidden), max(1, STEP_TOKENS // hidden.shape[1])
        paths = [_path(block, group[0]) for group in groups]
        twin = None
        if original is not None and self._original is not None:
            twin = Twin(original, self._original, paths, batch)
        gates = {
            path: Stage(group, self._sum(group, hidden, self._cross), solve, twin)
            for path, group in zip(paths, groups, strict=True)
        }
        cache = self.placing.watch_cache(block)
        try:
            block.in_step(hidden, gates, batch)
        finally:
            if twin is not None:
                twin.close()
        self.placing.write_kept(rows, tensors)
        self.placing.write_cache(cache)
        self._canary(block.index, first, before, hidden[:1])
        return hidden

    def _learned(
        self,
        block: Block,
        solver: BlockSolver,
        rows: Sequence[Row],
        tensors: dict[str, Tensor],
        hidden: Tensor,
    ) -> Tensor:
        """All weights of the block learned at once, from what the original's makes of its own inputs."""
        assert self._original is not None
        batch = max(1, MICRO_TOKENS // hidden.shape[1])
        first = hidden[:1].clone()
        before, wanted = block.forward(first), block.run(self._original, batch)
        groups = self._groups(block, rows, hidden)
        moments = self._gather(block, groups, hidden)
        if not self.fitting.transforms:
            self._keep(moments)
        stacks = [stack for group in groups for stack in self.placing.stacks(group)]

        def outputs(values: Sequence[Tensor], windows: Tensor) -> Tensor:
            weights = {
                _path(block, row): unturned(row, part)
                for stack, value in zip(stacks, values, strict=True)
                for row, part in zip(stack, value.split([row.shape[0] for row in stack]), strict=True)
            }
            return block.outputs(weights, hidden[windows])

        known = [moments[stack[0].name] for stack in stacks]
        told = [m if m.tokens else None for m in known]
        task = BlockTask(
            f"block {block.index}",
            [self.placing.problem(s, tensors, m) for s, m in zip(stacks, told, strict=True)],
            [stack[0].grid for stack in stacks],
            len(hidden),
            outputs,
            wanted.__getitem__,
        )
        for stack, solution, m in zip(stacks, solver.learn(task), known, strict=True):
            self._assign(block, stack, self.placing.accept(stack, solution, tensors, m), m)
        self.placing.write_kept(rows, tensors)
        cache = self.placing.watch_cache(block)
        hidden.copy_(block.run(hidden, batch))
        self.placing.write_cache(cache)
        self._original = wanted
        self._canary(block.index, first, before, hidden[:1])
        return hidden

    def _place(
        self, block: Block, group: Sequence[Row], tensors: dict[str, Tensor], moments: Moments
    ) -> None:
        """Solve a group, and have the block compute as the quantized model will from here on."""
        self._assign(block, group, self.placing.solve(group, tensors, moments), moments)
        for row in group:
            del tensors[row.name]  # the block computes with the new values: the old ones are memory

    def _assign(
        self, block: Block, rows: Sequence[Row], values: Mapping[str, Tensor], moments: Moments
    ) -> None:
        for row in rows:
            block.assign(row.name.removeprefix(block.prefix), values[row.name])
            self.placing.count(row, moments.tokens, block.sent(_path(block, row)))
            if row.inputs is not None:
                fixed = fixed_by(row, moments, self.plan.dtype)
                basis = partial(Hadamard.plain, row.turn) if row.turn else None
                block.inputs[_path(block, row)] = Inputs(row.inputs, fixed, basis)

    def _groups(self, block: Block, rows: Sequence[Row], hidden: Tensor) -> list[list[Row]]:
        """Solved rows grouped by the input they share, in the order the block runs them."""
        by_path = {_path(block, row): row for row in rows if row.solved}
        groups = [[by_path[p] for p in paths if p in by_path] for paths in block.shared_inputs(hidden[:1])]
        seen = {row.name for group in groups for row in group}
        lost = [row.name for row in by_path.values() if row.name not in seen]
        if lost:
            raise Refused(
                f"{len(lost)} weights take no part in block {block.index}'s forward pass",
                where=lost[0],
                fix="keep them, or use a solver that needs no calibration (nearest, hqq, clip)",
            )
        return [group for group in groups if group]

    def _sum(self, group: Sequence[Row], hidden: Tensor, cross: bool) -> MomentSum:
        gram, signed = self.plan.needs == "gram", needs_zero(group)
        fixed = any(row.inputs is not None and row.inputs.fixed for row in group)
        extremes = not gram or fixed or self.keep_moments or bool(self.fitting.transforms)
        turn = Hadamard.plain(group[0].turn) if group[0].turn else None
        return MomentSum(group[0].shape[1], gram, hidden.device, signed, cross, extremes, turn)

    def _keep(self, moments: Mapping[str, Moments]) -> None:
        if self.keep_moments:
            self.kept_moments.update(moments)

    def _gather(
        self,
        block: Block,
        groups: Sequence[Sequence[Row]],
        hidden: Tensor,
        original: Tensor | None = None,
    ) -> dict[str, Moments]:
        """Moments of the block as it is; with ``original``, cross moments too, and it goes through."""
        batch = max(1, MICRO_TOKENS // hidden.shape[1])
        sums: dict[str, MomentSum] = {}
        seen: dict[str, Tensor] = {}
        hooks = {}
        for group in groups:
            total = sums[group[0].name] = self._sum(group, hidden, original is not None)
            path, name = _path(block, group[0]), group[0].name
            hooks[path] = lambda x, add=total.add, path=path, name=name: add(x, name, seen.get(path))
        keep = {path: partial(seen.__setitem__, path) for path in hooks}
        block.recount()
        for a in range(0, hidden.shape[0], batch):
            if original is not None:
                part = original[a : a + batch]
                part.copy_(block.watched(part, keep))
            block.watched(hidden[a : a + batch], hooks)
        return {
            row.name: moments
            for group in groups
            for moments in [sums[group[0].name].moments()]
            for row in group
        }

    def _fold(
        self,
        block: Block,
        rows: Sequence[Row],
        tensors: dict[str, Tensor],
        moments: dict[str, Moments],
        hidden: Tensor,
    ) -> dict[str, Moments]:
        """Fit and fold, unless the block does not gain by it; ``tensors`` changes in place, and ``block``
        holds anything afterwards. The moments of the inputs as they are then."""
        before = dict(tensors)
        moments |= self.fitting.keys(block, self.fitting.sample(hidden))
        folded, notes = self.fitting.fold(block.index, rows, tensors, moments)
        gain = self.fitting.gain(block, rows, before, tensors, hidden) if notes else 0.0
        if gain >= 1:
            tensors.update(before)
            text = f"nothing folded: rounded to nearest, the block's error would be x {gain:.3f}"
            notes, folded = [Note("transform", f"block {block.index}", text, gain)], moments
        self.notes += notes
        return folded

    def _canary(self, index: int, hidden: Tensor, before: Tensor, after: Tensor) -> None:
        """Stop a run whose block no longer resembles itself, before hours go into the next ones."""
        moved = (before - hidden).norm().clamp_min(1e-30)
        error = float((after - before).norm() / moved)
        self.blocks[f"block {index}"] = error
        if not torch.isfinite(after).all() or error > EXPLOSION:
            worst = max(
                ((n, e["relative"]) for n, e in self.placing.tensors.items() if f".layers.{index}." in n),
                key=lambda p: p[1],
            )
            raise Unsolvable(
                f"the output of block {index} is off by {error:.3g} times its own contribution",
                where=f"block {index}; its worst weight is {worst[0]} (relative error {worst[1]:.3g})",
                fix="more bits, smaller groups, more calibration text, or more damping, e.g. gptq(damp=0.1)",
            )

    def _journal(self, unit: str, before: int, hidden: Tensor | None) -> None:
        layer = f".layers.{unit.removeprefix('block ')}."
        record = {
            "notes": [vars(note) for note in self.notes[before:]],
            "tensors": {n: e for n, e in self.placing.tensors.items() if layer in n},
            "block_error": self.blocks.get(unit),
        }
        live = None if hidden is None else {"hidden": hidden.cpu()}
        if live is not None and self._original is not None:
            live["original"] = self._original.cpu()
        self.space.finish_unit(unit, record, live)

    def _worth_keeping(self, index: int, hidden: Tensor | None) -> bool:
        """Whether a resumed run should find this block's output, rather than compute it again."""
        if hidden is None:
            return False
        size, width = (
            n * hidden.element_size() * (1 + self._along) for n in (hidden.numel(), hidden.shape[-1])
        )
        weights = sum(math.prod(row.shape) for row in self.plan.rows if row.layer == index)
        return (index + 1) % blocks_between(size, width, weights) == 0

    def _recall(self, record: Mapping[str, Any]) -> None:
        self.notes += [Note(**note) for note in record["notes"]]
        self.placing.tensors.update(record["tensors"])
        if record["block_error"] is not None:
            self.blocks[record["unit"]] = record["block_error"]

    def _hidden_so_far(self, done: Sequence[Mapping[str, Any]]) -> Tensor | None:
        if done and "live" in done[-1]:
            live = self.space.load_live(done[-1]["live"])
            self._original = live["original"].to(self.device) if self._along else None
            return live["hidden"].to(self.device)
        return None

    def _block_line(self, index: int) -> str:
        errors = [e["relative"] for n, e in self.placing.tensors.items() if f".layers.{index}." in n]
        if not errors:
            return f"block {index}"
        text = f"block {index}: weights off by {100 * sum(errors) / len(errors):.2f} %"
        out = self.blocks.get(f"block {index}")
        return text if out is None else f"{text}, output by {100 * out:.2f} %"


def _path(block: Block, row: Row) -> str:
    return row.name.removeprefix(block.prefix).removesuffix(".weight")
