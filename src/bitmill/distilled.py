"""A quantized model as a function of what is stored beside its codes, with derivatives.

It goes block by block in both directions: each block's input is kept on the way up, and on the way down the
block is computed once more with derivatives. Codes, leaves and one dense block are in memory, never a model.
Of the original, which runs once, the hidden states behind its last block stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bitmill.calibrate.head import Head, divergence
from bitmill.calibrate.stream import Block, Stream
from bitmill.core.axes import inputs_of
from bitmill.core.errors import Unsolvable
from bitmill.core.types import Quantized, Row
from bitmill.numerics.moving import all_linear, moving, slopes
from bitmill.numerics.portions import Portions
from bitmill.relabel import relabelled
from bitmill.tuning_plan import MICRO_TOKENS
from bitmill.walk import Walk

Leaves = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight whose scales move.

    Attributes:
        row: of the plan.
        quantized: as the walk left it.
        names: of the scales that move; their leaves are called ``NAME:scale``.
        linear: whether values are linear in all of them together.
    """

    row: Row
    quantized: Quantized
    names: tuple[str, ...]
    linear: bool

    def at(self, leaves: Leaves) -> Quantized:
        """With the scales of ``leaves``."""
        scales = {name: leaves[f"{self.row.name}:{name}"] for name in self.names}
        return replace(self.quantized, params={**self.quantized.params, **scales})


@dataclass(frozen=True, eq=False)
class _Norm:
    """The weight of a norm that moves."""

    row: Row
    start: Tensor
    unit: Tensor


class Distilled:
    """The quantized model as a function of its leaves, with derivatives.

    Args:
        walk: that has written it.
        norms: whether weights of norms are leaves, too.

    Attributes:
        portions: tokens inside a block at once.
    """

    def __init__(self, walk: Walk, norms: bool) -> None:
        self._walk, self._device = walk, torch.device(walk.device)
        self.portions = Portions(MICRO_TOKENS, "tokens")
        self._written = walk.container.open(walk.space.payload)
        rows = {row.name: row for row in walk.plan.rows}
        self.weights = {name: w for name, row in rows.items() if (w := self._weight(row)) is not None}
        self.stream = Stream(self._written, walk.device, read=self._read)
        self.head: Head = self.stream.head()
        self.norms = {n: self._norm(row) for n, row in rows.items() if norms and self._moves(row)}
        self._blocks = list(self.stream.blocks())
        self._inside = [
            [n for n in (*self.weights, *self.norms) if n.startswith(block.prefix)] for block in self._blocks
        ]

    def start(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The leaves as they are, and how far a relative change of 1 takes them."""
        scales = {
            f"{w.row.name}:{name}": w.quantized.params[name].float()
            for w in self.weights.values()
            for name in w.names
        }
        norms = {n: norm.start for n, norm in self.norms.items()}
        units = {name: scale.abs() for name, scale in scales.items()}
        return {**scales, **norms}, {**units, **{n: norm.unit for n, norm in self.norms.items()}}

    def stored(self, leaves: Leaves, start: Leaves) -> dict[str, Tensor]:
        """The nearest leaves that the file can hold; one that has not moved stays what it is."""
        made = {}
        for weight in self.weights.values():
            for name in weight.names:
                key = f"{weight.row.name}:{name}"
                near = weight.quantized.grid.stored_scale(name, leaves[key])
                made[key] = torch.where(leaves[key] == start[key], start[key], near)
        for name, norm in self.norms.items():
            near = norm.row.grid.round(leaves[name]).dense()
            made[name] = torch.where(leaves[name] == start[name], start[name], near)
        return made

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
        hidden = self._up(tokens, leaves, inputs, size)
        loss, gradient, found = self._top(hidden, wanted, original, leaves)
        for block, names in zip(reversed(self._blocks), reversed(self._inside), strict=True):
            gradient, here = self._down(block, names, leaves, inputs.pop(), gradient, size)
            found.update(here)
        return loss, found

    def write(self, leaves: Leaves) -> None:
        """Over what the walk has written."""
        told = inputs_of(self._written)
        for name, weight in self.weights.items():
            moved = weight.at(leaves)
            params = {k: v.to(weight.quantized.params[k].dtype).cpu() for k, v in moved.params.items()}
            fixed = told[name].fixed if weight.row.inputs is not None and name in told else {}
            codes = weight.quantized.codes.cpu()
            self._walk.placing.rewrite(weight.row, replace(moved, codes=codes, params=params, inputs=fixed))
        for name, norm in self.norms.items():
            self._walk.placing.write(norm.row, norm.row.grid.round(leaves[name].cpu()))

    def _through(self, work: Callable[[int], T], tokens: Tensor) -> T:
        return self.portions.through(work, tokens.numel(), tokens.shape[1])

    def _up(self, tokens: Tensor, leaves: Leaves, inputs: list[Tensor] | None, size: int) -> Tensor:
        hidden = self.stream.embed(tokens)
        with torch.no_grad():
            for block, names in zip(self._blocks, self._inside, strict=True):
                if inputs is not None:
                    inputs.append(hidden)
                values = {_path(block, n): v for n, v in self._values(names, leaves).items()}
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
        values = {name: value.requires_grad_() for name, value in self._values(names, leaves).items()}
        paths = {_path(block, name): value for name, value in values.items()}
        sums = {name: torch.zeros_like(value) for name, value in values.items()}
        before = []
        for x, pull in zip(_parts(inputs, size), _parts(gradient, size), strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                out = block.outputs(paths, x)
            found = torch.autograd.grad(out, [x, *values.values()], pull, allow_unused=True)
            before.append(torch.zeros_like(x) if found[0] is None else found[0])
            for name, part in zip(values, found[1:], strict=True):
                if part is not None:
                    sums[name] += part
        made: dict[str, Tensor] = {}
        for name, total in sums.items():
            if name in self.norms:
                made[name] = total * self.norms[name].unit
                continue
            weight = self.weights[name]
            by = slopes(weight.at(leaves), weight.names, weight.linear, values[name].detach(), total)
            made.update({f"{name}:{scale}": slope for scale, slope in by.items()})
        return torch.cat(before), made

    def _values(self, names: Sequence[str], leaves: Leaves) -> dict[str, Tensor]:
        return {
            n: leaves[n].clone() if n in self.norms else self.weights[n].at(leaves).dense() for n in names
        }

    def _weight(self, row: Row) -> _Weight | None:
        names = moving(row.grid) if row.solved and row.layer is not None else ()
        stored = self._written.stored(row.name) if names else None
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
        return _Weight(row, on, names, all_linear(on, names))

    def _moves(self, row: Row) -> bool:
        """Whether a row is the weight of a norm inside a block, or the one behind them."""
        inside = row.layer is not None and "norm" in row.name.rsplit(".", 2)[-2] and len(row.shape) == 1
        return row.name.endswith(".weight") and (inside or row.name == self.head.norm_name)

    def _norm(self, row: Row) -> _Norm:
        start = self._written.read(row.name).float().to(self._device)
        return _Norm(row, start, (start + self._walk.plan.family.norm_offset).abs())

    def _read(self, name: str) -> Tensor:
        """A tensor of the written model; of one that moves, its shape alone."""
        if name in self.weights:
            return torch.zeros(1, device=self._device).expand(self.weights[name].row.shape)
        return self._written.read(name)


def _later(windows: Tensor) -> Tensor:
    """The second half of each: there the model has read enough to be judged by."""
    return windows[:, windows.shape[1] // 2 :]


def _parts(hidden: Tensor, size: int) -> tuple[Tensor, ...]:
    return hidden.split(max(1, size // hidden.shape[1]))


def _path(block: Block, name: str) -> str:
    return name.removeprefix(block.prefix).removesuffix(".weight")
