"""Streaming moments of a linear layer's input: Gram, mean square, mean and largest magnitude, in float32.

They are sums over tokens, so parts taken on different texts or machines merge by addition. The file is
safetensors; a group of layers that share an input (q, k and v) is stored once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitmill.calibrate.crew import Crew
from bitmill.core.errors import BadFile, Refused, Unsolvable
from bitmill.core.types import SAMPLE, Basis, Moments

FILE_KIND = "bitmill-moments-1"
GOLDEN = (5**0.5 - 1) / 2
_PANEL = 192  # rows at most: wider ones lose more to what is done twice than thin products cost


class Sampled:
    """Rows that are kept of a stream, :data:`SAMPLE` at most, however it is cut into parts.

    Row ``i`` stays while the fractional part of ``i φ`` is small enough: that is spread evenly over any
    stretch, and never in step with windows.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(0, width, device=device)
        self._places = torch.zeros(0, dtype=torch.float64)
        self._limit = 1.0

    def add(self, x: Tensor, before: int) -> None:
        """``n width`` rows that follow ``before`` others."""
        places = torch.arange(before, before + len(x), dtype=torch.float64) * GOLDEN % 1
        new = torch.nonzero(places < self._limit)[:, 0]
        self.rows = torch.cat([self.rows, x[new.to(x.device)].float()])
        self._places = torch.cat([self._places, places[new]])
        while len(self.rows) > SAMPLE:
            self._limit /= 2
            keep = torch.nonzero(self._places < self._limit)[:, 0]
            self.rows, self._places = self.rows[keep.to(self.rows.device)], self._places[keep]


@dataclass
class MomentSum:
    """Accumulator for one input; :meth:`moments` freezes it.

    Attributes:
        width: channels of the input.
        gram: whether to keep ``x xᵀ`` (``width² × 4`` bytes) or its diagonal only.
        signed: whether to keep the smallest and largest ``x``, not the largest magnitude only.
        cross: whether to keep ``(x̃ - x) xᵀ`` too, with the original model's ``x̃``.
        extremes: whether to keep ``|x|``, its sum and its largest: what transforms and fixed ranges need. A
            Gram matrix alone is then one product less, and one reading.
        turn: what the layer's runtime multiplies the input by first; the moments are of that.
    """

    width: int
    gram: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    signed: bool = False
    cross: bool = False
    extremes: bool = True
    turn: Basis | None = None

    def __post_init__(self) -> None:
        self.tokens = 0
        self._square = self._zeros(self.width)
        self._magnitude = self._absmax = None if not self.extremes else self._zeros(self.width)
        self._gram = self._zeros(self.width, self.width) if self.gram else None
        self._low = self._high = None if not self.signed else self._zeros(self.width)
        self._cross = self._zeros(self.width, self.width) if self.cross else None
        self._sample = None if not self.extremes else Sampled(self.width, self.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float32, device=self.device)

    def add(self, x: Tensor, where: str, original: Tensor | None = None) -> None:
        """Add ``tokens in`` activations.

        Args:
            original: the same tokens' activations in the original model, where ``cross`` is kept.

        Raises:
            Unsolvable: an activation is NaN or infinite; ``where`` is named.
        """
        self.add_all([x], where, None if original is None else [original])

    def add_all(self, parts: Sequence[Tensor], where: str, originals: Sequence[Tensor] | None = None) -> None:
        """As :meth:`add` of each, one after the other, their Gram matrices on all threads."""
        parts = [self._seen(x) for x in parts]
        for x in parts:
            self._add_sums(x)
        if self._gram is not None:
            _add_upper(self._gram, parts)
        self._check(parts, where)
        if self._cross is not None and originals is not None:
            for x, original in zip(parts, originals, strict=True):
                self._cross.addmm_((self._seen(original) - x).T, x)

    def _add_sums(self, x: Tensor) -> None:
        if self._sample is not None:
            self._sample.add(x, self.tokens)
        self.tokens += x.shape[0]
        if self._magnitude is not None and self._absmax is not None:
            magnitude = x.abs()
            self._absmax = torch.maximum(self._absmax, magnitude.amax(0))
            self._magnitude += (magnitude.new_ones(1, len(x)) @ magnitude)[0]  # half the time of a row sum
        if self._low is not None and self._high is not None:
            self._low = torch.minimum(self._low, x.amin(0))
            self._high = torch.maximum(self._high, x.amax(0))
        if self._gram is None:
            self._square += x.square().sum(0)

    def _check(self, parts: Sequence[Tensor], where: str) -> None:
        known = self._square if self._gram is None else self._gram.diagonal()
        if not torch.isfinite(known).all():
            bad = sum(int((~torch.isfinite(x)).sum()) for x in parts)
            raise Unsolvable(
                f"{bad} of {sum(x.numel() for x in parts)} activations are NaN or infinite"
                if bad
                else "activations overflow",
                where=f"input of {where}",
                fix="check that the source model itself produces finite logits; calibrate with --device cpu",
            )

    def _seen(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.width).float()
        return x if self.turn is None else self.turn.turn(x)

    def moments(self) -> Moments:
        """The sums so far, as a frozen record. The accumulator must not be used afterwards."""
        gram = self._gram
        if gram is None:
            square = self._square
        else:
            _mirror(gram)
            square = gram.diagonal().clone()
        return Moments(
            self.tokens,
            square,
            self._magnitude,
            self._absmax,
            gram,
            self._low,
            self._high,
            self._cross,
            None if self._sample is None else self._sample.rows,
        )


def _add_upper(gram: Tensor, parts: Sequence[Tensor]) -> None:
    """Add ``xᵀx`` of every part to the upper triangle, a panel of rows at a time: 9/16 of the full product's
    work at eight panels. What falls below the diagonal inside a panel is overwritten by :func:`_mirror`.

    On the CPU each thread has panels of its own, so that the order of a sum is that of the parts.
    """
    width = gram.shape[0]
    rows = max(_PANEL // 2, min(_PANEL, width // 8))
    panels = [(a, min(a + rows, width)) for a in range(0, width, rows)]
    size = min(torch.get_num_threads(), len(panels)) if gram.device.type == "cpu" else 1

    def work(k: int) -> None:
        for place, (a, b) in enumerate(panels):
            turn, worker = divmod(place, size)
            if k == (worker if turn % 2 == 0 else size - 1 - worker):  # panels shrink: back and forth is fair
                for x in parts:
                    gram[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])

    with closing(Crew(size)) as crew:
        crew.each(work)


def _mirror(gram: Tensor, rows: int = 1024) -> None:
    """Copy the upper triangle onto the lower one in place, a strip at a time."""
    n = gram.shape[0]
    for a in range(0, n, rows):
        b = min(a + rows, n)
        corner = gram[a:b, a:b]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[b:, a:b] = gram[a:b, b:].T


def save_moments(path: Path, moments: Mapping[str, Moments], facts: Mapping[str, str]) -> None:
    """Write moments by tensor name; tensors that share one record share its bytes.

    Args:
        path: a ``.safetensors`` file; written beside and renamed.
        moments: weight name to moments of its input.
        facts: provenance (model digest, corpus hash, seed) that :func:`load_moments` hands back.
    """
    groups: dict[int, str] = {}
    names: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, record in moments.items():
        key = groups.setdefault(id(record), name)
        names[name] = key
        if key == name:
            parts = {
                "square": record.square,
                "magnitude": record.magnitude,
                "absmax": record.absmax,
                "gram": record.gram,
                "low": record.low,
                "high": record.high,
                "cross": record.cross,
                "sample": record.sample,
            }
            tensors[f"{key}/tokens"] = torch.tensor(record.tokens)
            tensors.update({f"{key}/{n}": part.contiguous() for n, part in parts.items() if part is not None})
    header = {"kind": FILE_KIND, "names": json.dumps(names), "facts": json.dumps(dict(facts))}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)


def load_moments(path: Path) -> tuple[dict[str, Moments], dict[str, str]]:
    """Read what :func:`save_moments` wrote: moments by tensor name, and the recorded facts.

    Raises:
        BadFile: the file is not a moments file.
    """
    if not path.is_file():
        raise Refused(f"there is no moments file {str(path)!r}", fix="make one with --save-moments")
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("kind") != FILE_KIND:
            raise BadFile("not a moments file", where=str(path), fix="make one with --save-moments")
        names: dict[str, str] = json.loads(header["names"])
        stored = set(file.keys())
        records = {key: _record(file, key, stored) for key in sorted(set(names.values()))}
    return {name: records[key] for name, key in names.items()}, json.loads(header["facts"])


def _record(file: safe_open, key: str, stored: Set[str]) -> Moments:
    magnitude, absmax, gram, low, high, cross, sample = (
        file.get_tensor(f"{key}/{part}") if f"{key}/{part}" in stored else None
        for part in ("magnitude", "absmax", "gram", "low", "high", "cross", "sample")
    )
    tokens, square = (file.get_tensor(f"{key}/{part}") for part in ("tokens", "square"))
    return Moments(int(tokens), square, magnitude, absmax, gram, low, high, cross, sample)
