"""A quantized model as a function of what moves in it, with derivatives.

It goes block by block in both directions: each block's input is kept on the way up, and on the way down the
block is computed once more with derivatives. Codes, leaves and one dense block are in memory, never a model.
Of the original, which runs once, the hidden states behind its last block stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bitmill.calibrate.head import Head, divergence
from bitmill.calibrate.stream import Block, Stream
from bitmill.core.axes import cache_of, inputs_of
from bitmill.core.errors import Unsolvable
from bitmill.core.learning import ModelSolver
from bitmill.core.types import Row
from bitmill.moved import SLOW, Leaves, Moved, MovedNorm, MovedScales, MovedWeight
from bitmill.numerics.half import products_in_half
from bitmill.numerics.moving import all_linear, moving
from bitmill.numerics.portions import Portions
from bitmill.relabel import relabelled
from bitmill.tuning_plan import MICRO_TOKENS
from bitmill.walk import Walk

T = TypeVar("T")


class Distilled:
    """The quantized model as a function of its leaves, with derivatives.

    Args:
        walk: that has written it.
        solver: that learns.
        blocks: of them, those that move; the rest stays, codes and scales.

    Attributes:
        weights: those that are kept as codes, by name.
        norms: those that move, by the name of their weight.
        portions: tokens inside a block at once.
    """

    def __init__(self, walk: Walk, solver: ModelSolver, blocks: range) -> None:
        self._walk, self._device, self._solver = walk, torch.device(walk.device), solver
        self.portions = Portions(MICRO_TOKENS, "tokens")
        self._written = walk.container.open(walk.space.payload)
        rows = self._rows = {row.name: row for row in walk.plan.rows}
        kept = {n: w for n, row in rows.items() if (w := self._weight(row, row.layer in blocks)) is not None}
        self.weights: Mapping[str, Moved] = kept
        self.stream = Stream(self._written, walk.device, read=self._read)
        # What is rounded on the way has to be multiplied as it was rounded.
        self._half = solver.half and not (inputs_of(self._written) or cache_of(self._written))
        self.head: Head = self.stream.head()
        last = len(blocks) > 0 and blocks[-1] + 1 == self.stream.layers
        moves = {
            n: row.layer in blocks if row.layer is not None else last
            for n, row in rows.items()
            if solver.norms and self._is_norm(row)
        }
        self.norms = {n: self._norm(rows[n]) for n, moving in moves.items() if moving}
        self._all: Mapping[str, Moved] = {**self.weights, **self.norms}
        self._blocks = list(self.stream.blocks())
        self._inside = [[n for n in self._all if n.startswith(block.prefix)] for block in self._blocks]

    def start(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The leaves as they are, and how far a relative change of 1 takes them."""
        found = [(one.start(), one.units()) for one in self._all.values()]
        return {n: v for s, _ in found for n, v in s.items()}, {n: v for _, u in found for n, v in u.items()}

    def stored(self, leaves: Leaves) -> dict[str, Tensor]:
        """The nearest leaves that the file can hold; one that has not moved stays what it is."""
        return {name: near for one in self._all.values() for name, near in one.near(leaves).items()}

    def wanted(self, tokens: Tensor) -> Tensor:
        """The original's hidden states behind its last block, of the second half of each window."""
        stream = Stream(self._walk.source, self._walk.device)

        def say(hidden: Tensor, index: int) -> Tensor:
            self._walk.tell("original", index + 1, stream.layers, "")
            return hidden

        length = tokens.shape[1]
        run = partial(stream.hidden, tokens, after=say)
        return _later(self._through(lambda size: run(max(1, size // length)), tokens)).clone()

    @torch.no_grad()
    def judge(self, tokens: Tensor, wanted: Tensor, original: Head, leaves: Leaves) -> float:
        """Mean divergence over windows, in nats."""
        hidden = self._through(partial(self._up, tokens, leaves, None), tokens)
        norm = leaves.get(self.head.norm_name)
        parts = [
            divergence(original.logits(theirs), self.head.logits(ours, norm)).mean()
            for ours, theirs in zip(_later(hidden), wanted, strict=True)
        ]
        return float(torch.stack(parts).double().mean())

    def lesson(
        self, tokens: Tensor, wanted: Tensor, original: Head, leaves: Leaves
    ) -> tuple[float, dict[str, Tensor]]:
        """Mean divergence over windows, and its derivatives by relative changes of the leaves."""
        return self._through(partial(self._lesson, tokens, wanted, original, leaves), tokens)

    def _lesson(
        self, tokens: Tensor, wanted: Tensor, original: Head, leaves: Leaves, size: int
    ) -> tuple[float, dict[str, Tensor]]:
        """With so many tokens inside a block at once."""
        inputs: list[Tensor] = []
        hidden = self._up(tokens, leaves, inputs, size, self._half)
        loss, gradient, found = self._top(hidden, wanted, original, leaves)
        for block, names in zip(reversed(self._blocks), reversed(self._inside), strict=True):
            gradient, here = self._down(block, names, leaves, inputs.pop(), gradient, size)
            found.update(here)
        return loss, found

    def write(self, leaves: Leaves) -> None:
        """Over what the walk has written."""
        told = inputs_of(self._written)
        for name, weight in self.weights.items():
            if not weight.moves:
                continue
            moved, row = weight.quantized(leaves), self._rows[name]
            own = weight.placed.params if isinstance(weight, MovedScales) else moved.params
            params = {k: v.to(own[k].dtype).cpu() for k, v in moved.params.items()}
            fixed = told[name].fixed if row.inputs is not None and name in told else {}
            codes = moved.codes.cpu()
            self._walk.placing.rewrite(row, replace(moved, codes=codes, params=params, inputs=fixed))
        for name, norm in self.norms.items():
            self._walk.placing.write(norm.row, norm.quantized({name: leaves[name].cpu()}))

    def _through(self, work: Callable[[int], T], tokens: Tensor) -> T:
        return self.portions.through(work, tokens.numel(), tokens.shape[1])

    def _up(
        self, tokens: Tensor, leaves: Leaves, inputs: list[Tensor] | None, size: int, half: bool = False
    ) -> Tensor:
        hidden = self.stream.embed(tokens)
        with torch.no_grad(), products_in_half(self._device, half):
            for block, names in zip(self._blocks, self._inside, strict=True):
                if inputs is not None:
                    inputs.append(hidden)
                values = {_path(block, n): self._all[n].value(leaves) for n in names}
                hidden = torch.cat([block.outputs(values, part) for part in _parts(hidden, size)])
        return hidden

    def _top(
        self, hidden: Tensor, wanted: Tensor, original: Head, leaves: Leaves
    ) -> tuple[float, Tensor, dict[str, Tensor]]:
        norm = leaves.get(self.head.norm_name)
        norm = None if norm is None else norm.detach().requires_grad_()
        gradient, later = torch.zeros_like(hidden), hidden.shape[1] - wanted.shape[1]
        total, by_norm = 0.0, None if norm is None else torch.zeros_like(norm)
        for at in range(len(hidden)):
            x = hidden[at, later:].detach().requires_grad_()
            with torch.no_grad():
                theirs = original.logits(wanted[at])
            with torch.enable_grad():
                loss = divergence(theirs, self.head.logits(x, norm)).mean() / len(hidden)
            parts = torch.autograd.grad(loss, [x] if norm is None else [x, norm])
            gradient[at, later:] = parts[0]
            by_norm = None if by_norm is None else by_norm + parts[1]
            total += float(loss.detach())
        name = self.head.norm_name
        return total, gradient, {} if by_norm is None else {name: by_norm * self.norms[name].unit}

    def _down(
        self,
        block: Block,
        names: Sequence[str],
        leaves: Leaves,
        inputs: Tensor,
        gradient: Tensor,
        size: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Derivatives by a block's input, and by its leaves."""
        values = {name: self._all[name].value(leaves) for name in names}
        moving = {name: v.requires_grad_() for name, v in values.items() if self._all[name].moves}
        paths = {_path(block, name): value for name, value in values.items()}
        sums = {name: torch.zeros_like(value) for name, value in moving.items()}
        before = []
        for x, pull in zip(_parts(inputs, size), _parts(gradient, size), strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad(), products_in_half(self._device, self._half):
                out = block.outputs(paths, x)
            found = torch.autograd.grad(out, [x, *moving.values()], pull, allow_unused=True)
            before.append(torch.zeros_like(x) if found[0] is None else found[0])
            for name, part in zip(moving, found[1:], strict=True):
                if part is not None:
                    sums[name] += part
        made: dict[str, Tensor] = {}
        for name, total in sums.items():
            made |= self._all[name].slopes(leaves, values[name].detach(), total)
        return torch.cat(before), made

    def _weight(self, row: Row, moves: bool) -> Moved | None:
        """A weight that is kept as codes, or moves; None for one that the model has as it is."""
        if not (row.solved and row.layer is not None) or self._solver.refuses(row.grid) is not None:
            return None
        stored = self._written.stored(row.name)
        if stored is None:
            return None
        same = relabelled(stored, row.grid)
        if same is None:
            raise Unsolvable(
                f"what is stored as {stored.grid} cannot be read back as {row.grid}",
                where=row.name,
                fix="a defect of this container's layout: report it with the recipe",
            )
        params = {k: v.to(self._device) for k, v in same.params.items()}
        on = replace(same, codes=same.codes.to(self._device), params=params)
        if moves and self._solver.weights:
            return MovedWeight.of(row, on, self._walk.read(row.name).float().to(self._device))
        names = moving(row.grid) if moves else ()
        return MovedScales(row, on, names, bool(names) and all_linear(on, names))

    def _is_norm(self, row: Row) -> bool:
        """Whether a row is the weight of a norm inside a block, or the one behind them."""
        inside = row.layer is not None and "norm" in row.name.rsplit(".", 2)[-2] and len(row.shape) == 1
        return row.name.endswith(".weight") and (inside or row.name == self.head.norm_name)

    def _norm(self, row: Row) -> MovedNorm:
        start = self._written.read(row.name).float().to(self._device)
        unit = (start + self._walk.plan.family.norm_offset).abs()
        return MovedNorm(row, start, unit * SLOW if self._solver.weights else unit)

    def _read(self, name: str) -> Tensor:
        """A tensor of the written model; of one that is kept as codes, or moves, its shape alone."""
        if name in self.weights:
            return torch.zeros(1, device=self._device).expand(self._rows[name].shape)
        return self._written.read(name)


def _later(windows: Tensor) -> Tensor:
    """The second half of each: there the model has read enough to be judged by."""
    return windows[:, windows.shape[1] // 2 :]


def _parts(hidden: Tensor, size: int) -> tuple[Tensor, ...]:
    return hidden.split(max(1, size // hidden.shape[1]))


def _path(block: Block, name: str) -> str:
    return name.removeprefix(block.prefix).removesuffix(".weight")
