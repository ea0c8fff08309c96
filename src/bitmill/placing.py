"""Where solved weights go: rows of one input solved together, errors noted, bytes in the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitmill.caching import CacheRange, same_cache
from bitmill.calibrate.stream import Block
from bitmill.core.axes import Checkpoint, Grid, Solver, cache_of, inputs_of
from bitmill.core.errors import Unsolvable
from bitmill.core.types import Moments, Note, Params, Problem, Quantized, Row, Solution
from bitmill.families.base import is_expert
from bitmill.inputs import fixed_by, same_inputs
from bitmill.journal import Workspace
from bitmill.numerics.floats import all_finite
from bitmill.numerics.linear_maps import Hadamard
from bitmill.planning import Plan

_TURNING = 2e-6  # of the largest weight: a rotation there and back in another order of summation
STACK_PROBE = 48  # rows of a trial weight: no multiple of any tile, so that a tile's parameters show


@dataclass
class Placing:
    """Solves weights and writes them, and knows what came of each.

    Attributes:
        notes: where the solver's go, in the order they come.
        tensors: errors of every solved weight, by name: ``relative``, and ``weighted`` where moments are.
    """

    plan: Plan
    source: Checkpoint
    space: Workspace
    solver: Solver
    notes: list[Note]
    tensors: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sample: dict[str, tuple[str, Tensor, Params]] = {}
        self._stacks: dict[str, bool] = {}
        self._scales: dict[str, Tensor] = {}

    def solve(
        self, rows: Sequence[Row], tensors: Mapping[str, Tensor], moments: Moments | None
    ) -> dict[str, Tensor]:
        """Place the rows of one group, write them, and hand back their dense values.

        Rows on the same row-wise grid are stacked: one factorization and one pass serve q, k and v, and a
        value the whole stack shares (NVFP4's gain) is the one that runtimes with fused projections demand.
        """
        stacks = self.stacks(rows)
        problems = [self.problem(stack, tensors, moments) for stack in stacks]
        grids = [stack[0].grid for stack in stacks]
        if moments is not None and not moments.tokens:
            solutions = [_unseen(problem, grid) for problem, grid in zip(problems, grids, strict=True)]
        else:
            solutions = self.solver.solve(problems, grids)
        values: dict[str, Tensor] = {}
        for stack, solution in zip(stacks, solutions, strict=True):
            values.update(self.accept(stack, solution, tensors, moments))
        return values

    def stacks(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of one input in stacks that are solved as one weight each."""
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(str(row.grid) if self._stackable(row) else row.name, []).append(row)
        return list(found.values())

    def problem(
        self, stack: Sequence[Row], tensors: Mapping[str, Tensor], moments: Moments | None
    ) -> Problem:
        """A stack as one problem."""
        name = "+".join(row.name for row in stack)
        runs = tuple((row.role, row.shape[0]) for row in stack)
        return Problem(name, stack[0].role, _stacked(stack, tensors), moments, stack[0].inputs, runs)

    def accept(
        self,
        stack: Sequence[Row],
        solution: Solution,
        tensors: Mapping[str, Tensor],
        moments: Moments | None,
    ) -> dict[str, Tensor]:
        """Note the errors of a stack's solution and write it; its dense values by name."""
        self.notes += solution.notes
        values: dict[str, Tensor] = {}
        parts = solution.quantized.parts([row.shape[0] for row in stack])
        for row, part in zip(stack, parts, strict=True):
            quantized = replace(part, inputs=fixed_by(row, moments, self.plan.dtype))
            dense = quantized.dense()
            self._record_error(row, _turned(row, tensors), dense, moments)
            self.write(row, quantized)
            dense = unturned(row, dense)
            self._sample.setdefault(row.role, (row.name, dense[:4].clone(), quantized.inputs))
            values[row.name] = dense
        return values

    def count(self, row: Row, tokens: int, sent: int | None = None) -> None:
        """Note how many tokens an expert's weight was placed by, and how many it was sent, if known."""
        if is_expert(row.name):
            self.tensors[row.name] |= {"tokens": tokens, **({} if sent is None else {"sent": sent})}

    def write_kept(self, rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> None:
        """Rows that keep their type: rounded to it, and written."""
        for row in rows:
            if not row.solved:
                self.write(row, row.grid.round(tensors[row.name].float()))

    def watch_cache(self, block: Block) -> dict[Row, CacheRange]:
        """From now on, the ranges of the block's keys and values, by the scales that they are to fix."""
        found: dict[str, CacheRange] = {}
        ranges: dict[Row, CacheRange] = {}
        turns = {row.name.rpartition(".")[0]: row.turn for row in self.plan.rows if row.cache and row.turn}
        for row in self.plan.rows:
            if row.cache is not None and row.cache.static and row.layer == block.index:
                path = row.name.rpartition(".")[0]
                if path not in found:
                    found[path] = CacheRange(turns.get(path, 0))
                    block.watch_cache(path.removeprefix(block.prefix), found[path].see)
                ranges[row] = found[path]
        return ranges

    def write_cache(self, ranges: Mapping[Row, CacheRange]) -> None:
        """The scales of a block's cache, once all tokens have gone through it."""
        for row, seen in ranges.items():
            scale = self._scales[row.name] = seen.scale(row, self.plan.dtype)["scale"]
            self.write(row, row.grid.round(scale))

    def write(self, row: Row, quantized: Quantized) -> None:
        """Lay out a weight, and write it to its slots."""
        for slot, data in self.plan.container.pack(row, quantized, self.source).items():
            self.space.write(slot, data)

    def rewrite(self, row: Row, quantized: Quantized) -> None:
        """Over a weight that was written before."""
        self.write(row, quantized)
        self._sample[row.role] = (row.name, quantized.dense()[:4].clone(), quantized.inputs)

    def verify_sample(self) -> None:
        """Open what was written as any reader would; compare a few rows of each role with what was solved.

        Raises:
            Unsolvable: the bytes do not decode to the solution; the output never appears.
        """
        written = self.plan.container.open(self.space.payload)
        turned = {row.name for row in self.plan.rows if row.turn}
        fixed = {name: inputs for name, _, inputs in self._sample.values()}
        told = same_inputs(inputs_of(written), self.plan.rows, fixed)
        told = told and same_cache(cache_of(written), self.plan.rows, self._scales)
        for name, rows, _ in self._sample.values():
            read = written.read(name)[: rows.shape[0]].float()
            same = torch.allclose(read, rows, rtol=0, atol=_TURNING * float(rows.abs().max()))
            if not told or not (same if name in turned else torch.equal(read, rows)):
                raise Unsolvable(
                    "what was written does not read back as what was solved",
                    where=f"{name} in {self.plan.recipe.container}",
                    fix="a defect of this container's layout: report it with the recipe",
                )

    def _stackable(self, row: Row) -> bool:
        """Whether weights may be solved as one: each parameter is a row's own, or a single value."""
        key = str(row.grid)
        if key not in self._stacks:
            shape = (STACK_PROBE, row.shape[1])
            params = row.grid.fit(torch.ones(shape)) if row.grid.refuses(shape) is None else {}
            self._stacks[key] = all(p.dim() == 0 or p.shape[0] == STACK_PROBE for p in params.values())
        return self._stacks[key]

    def _record_error(self, row: Row, weight: Tensor, dense: Tensor, moments: Moments | None) -> None:
        error = dense - weight
        if not all_finite(error):
            raise Unsolvable(
                "the quantized weight has non-finite values",
                where=row.name,
                fix="raise the damping, or use nearest",
            )
        record = {"relative": float(error.norm() / weight.norm().clamp_min(1e-30))}
        if moments is not None:
            root = moments.importance.sqrt()
            record["weighted"] = float((error * root).norm() / (weight * root).norm().clamp_min(1e-30))
        self.tensors[row.name] = record


def _unseen(problem: Problem, grid: Grid) -> Solution:
    text = "no calibration token was sent to this expert: rounded to nearest, every channel alike"
    return Solution(grid.round(problem.weight), (Note("no-importance", problem.name, text),))


def _stacked(stack: Sequence[Row], tensors: Mapping[str, Tensor]) -> Tensor:
    if len(stack) == 1:
        return _turned(stack[0], tensors)
    return torch.cat([_turned(row, tensors) for row in stack])


def _turned(row: Row, tensors: Mapping[str, Tensor]) -> Tensor:
    """A weight as it is stored: for inputs that a runtime rotates."""
    weight = tensors[row.name]
    return Hadamard.plain(row.turn).read(weight) if row.turn else weight


def unturned(row: Row, weight: Tensor) -> Tensor:
    """A weight as a model computes with it whose inputs are as they come."""
    return Hadamard.plain(row.turn).undo(weight) if row.turn else weight
