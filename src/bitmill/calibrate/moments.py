"""Streaming moments of a linear layer's input: Gram, mean square, mean and largest magnitude, in float32.

They are sums over tokens, so parts taken on different texts or machines merge by addition. The file is
safetensors; a group of layers that share an input (q, k and v) is stored once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitmill.core.errors import BadFile, Refused, Unsolvable
from bitmill.core.types import Moments

FILE_KIND = "bitmill-moments-1"
_PANEL = 192  # rows: fewer lose more to products too thin for both cores than to what is done twice


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
    """

    width: int
    gram: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    signed: bool = False
    cross: bool = False
    extremes: bool = True

    def __post_init__(self) -> None:
        self.tokens = 0
        self._square = self._zeros(self.width)
        self._magnitude = self._absmax = None if not self.extremes else self._zeros(self.width)
        self._gram = self._zeros(self.width, self.width) if self.gram else None
        self._low = self._high = None if not self.signed else self._zeros(self.width)
        self._cross = self._zeros(self.width, self.width) if self.cross else None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float32, device=self.device)

    def add(self, x: Tensor, where: str, original: Tensor | None = None) -> None:
        """Add ``tokens in`` activations.

        Args:
            original: the same tokens' activations in the original model, where ``cross`` is kept.

        Raises:
            Unsolvable: an activation is NaN or infinite; ``where`` is named.
        """
        x = x.reshape(-1, self.width).float()
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
        else:
            _add_upper(self._gram, x)
        known = self._square if self._gram is None else self._gram.diagonal()
        if not torch.isfinite(known).all():
            bad = int((~torch.isfinite(x)).sum())
            raise Unsolvable(
                f"{bad} of {x.numel()} activations are NaN or infinite" if bad else "activations overflow",
                where=f"input of {where}",
                fix="check that the source model itself produces finite logits; calibrate with --device cpu",
            )
        if self._cross is not None and original is not None:
            self._cross.addmm_((original.reshape(-1, self.width).float() - x).T, x)

    def moments(self) -> Moments:
        """The sums so far, as a frozen record. The accumulator must not be used afterwards."""
        gram = self._gram
        if gram is None:
            square = self._square
        else:
            _mirror(gram)
            square = gram.diagonal().clone()
        return Moments(
            self.tokens, square, self._magnitude, self._absmax, gram, self._low, self._high, self._cross
        )


def _add_upper(gram: Tensor, x: Tensor) -> None:
    """Add ``xᵀx`` to the upper triangle, a panel of rows at a time: 9/16 of the full product's work at
    eight panels. What falls below the diagonal inside a panel is overwritten by :func:`_mirror`."""
    for a in range(0, gram.shape[0], _PANEL):
        b = min(a + _PANEL, gram.shape[0])
        gram[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])


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
    magnitude, absmax, gram, low, high, cross = (
        file.get_tensor(f"{key}/{part}") if f"{key}/{part}" in stored else None
        for part in ("magnitude", "absmax", "gram", "low", "high", "cross")
    )
    tokens, square = (file.get_tensor(f"{key}/{part}") for part in ("tokens", "square"))
    return Moments(int(tokens), square, magnitude, absmax, gram, low, high, cross)
