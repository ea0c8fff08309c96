"""One measurement as a record: what was compared, on what, and every number; plain values for JSON and for
pages."""

from __future__ import annotations

import difflib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.types import Note
from bitmill.journal import report_path
from bitmill.measurement.logits import WORST, Choices, Positions, Summary
from bitmill.measurement.tensors import TensorTable

CURVE = 101  # quantiles of the KLD that the page draws
CONTEXT = 24  # tokens shown before a worst one
_HIGHER_IS_BETTER = ("same_top", "correlation", "mean_dp", "wrong_to_right")
_LARGEST_REPORT = 64 << 20
_TOLD = {"tokens": int, "windows": int, "window": int, "seed": int, "sha256": str}


@dataclass(frozen=True)
class Side:
    """One of the two models: its name, its content's digest, its architecture."""

    name: str
    digest: str
    model_type: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Side:
        """What a record keeps of a checkpoint; the name without the folders it lies in."""
        return cls(checkpoint.path.name, checkpoint.digest, str(checkpoint.config.get("model_type", "")))


@dataclass(frozen=True)
class Missed:
    """A threshold that is not met."""

    key: str
    limit: float
    value: float | None

    def __str__(self) -> str:
        found = "not a number" if self.value is None else f"{self.value:.6g}"
        return f"{self.key} is {found}, the limit is {self.limit:g}"


@dataclass(frozen=True, eq=False)
class Record:
    """Everything one measurement found.

    Attributes:
        summary, kinds: over all scored positions, and by kind of text.
        floor: the reference against itself under rounding-scale noise; differences below it mean nothing.
        overlap: share of each kind's phrases that the calibration text held; None where that is unknown.
        calibration: what the file's own report says about its calibration.
        positions, tokens, kind_of_window, decode: for comparing two records, and for the worst tokens.
        choices: what both models would rather say at the worst of them.
    """

    quantized: Side
    reference: Side
    protocol: Mapping[str, Any]
    corpus: Mapping[str, Any]
    summary: Summary
    kinds: Mapping[str, Summary]
    floor: Mapping[str, Any] | None
    bytes_: int
    bytes_reference: int
    table: TensorTable
    overlap: Mapping[str, float | None] | None
    calibration: Mapping[str, Any] | None
    notes: tuple[Note, ...]
    seconds: float
    positions: Positions
    tokens: Tensor
    kind_of_window: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]
    choices: tuple[Choices, ...] = ()

    @property
    def worst_kind(self) -> str:
        """The kind of text with the largest mean KLD."""
        return max(self.kinds, key=lambda kind: self.kinds[kind].kld.mean)

    def missed(self, limits: Mapping[str, float]) -> tuple[Missed, ...]:
        """The limits that this record does not meet.

        Args:
            limits: dotted keys of :meth:`to_json` (``kld.mean``, ``worst.kld.mean``,
                ``kinds.code.same_top``) to the largest allowed value; the smallest, for ``same_top`` and
                ``correlation``.

        Raises:
            Refused: a key names no number.
        """
        plain = self.to_json()
        found = []
        for key, limit in limits.items():
            value = _number(plain, key)
            higher = key.rpartition(".")[2] in _HIGHER_IS_BETTER
            if value is None or (value < limit if higher else value > limit):
                found.append(Missed(key, limit, value))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not a finite number is None."""
        worst = self.worst_kind
        plain = {
            "quantized": vars(self.quantized),
            "reference": vars(self.reference),
            **self.summary.to_json(),
            "floor": None if self.floor is None else self.floor["kld"],
            "floor_details": self.floor,
            "bytes": self.bytes_,
            "bytes_reference": self.bytes_reference,
            "bpw": self.table.bpw,
            "bpw_linears": self.table.bpw_linears,
            "parameters": self.table.parameters,
            "worst_kind": worst,
            "worst": self.kinds[worst].to_json(),
            "kinds": {kind: summary.to_json() for kind, summary in self.kinds.items()},
            "overlap": self.overlap,
            "protocol": dict(self.protocol),
            "corpus": {k: v for k, v in self.corpus.items() if k != "shingles"},
            "calibration": self.calibration,
            "curve": _curve(self.positions),
            "worst_tokens": self._worst_tokens(),
            "tensors": [row.to_json() for row in self.table.rows],
            "same_basis": self.table.same_basis,
            "notes": [vars(note) for note in self.notes],
            "seconds": self.seconds,
            "versions": {name: version(name) for name in ("bitmill", "torch", "transformers", "numpy")}
            | {"python": platform.python_version()},
        }
        return _finite(plain)

    def dumps(self) -> str:
        """JSON text."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def _worst_tokens(self) -> list[dict[str, Any]]:
        p = self.positions
        found = []
        known = {(c.window, c.place): c for c in self.choices}
        for i in np.argsort(-p.kld, kind="stable")[:WORST]:
            window, place = int(p.window[i]), int(p.place[i])
            first = known.get((window, place))
            before = self.tokens[window, max(0, place - CONTEXT) : place].tolist()
            found.append(
                {
                    "kind": self.kind_of_window[window],
                    "window": window,
                    "place": place,
                    "kld": float(p.kld[i]),
                    "context": self.decode(before),
                    "true": self.decode([int(p.target[i])]),
                    "reference": self.decode([int(p.top_reference[i])]),
                    "quantized": self.decode([int(p.top[i])]),
                    "confidence": float(p.confidence[i]),
                    "p_true_reference": math.exp(-p.nll_reference[i]),
                    "p_true": math.exp(-p.nll[i]),
                    "top_reference": self._said(() if first is None else first.reference),
                    "top_quantized": self._said(() if first is None else first.quantized),
                }
            )
        return found

    def _said(self, choices: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
        return [(self.decode([token]), share) for token, share in choices]


def _curve(positions: Positions) -> list[float]:
    kld = positions.kld[positions.finite]
    return [float(v) for v in np.quantile(kld, np.linspace(0, 1, CURVE))]


def _number(plain: Mapping[str, Any], key: str) -> float | None:
    value: Any = plain
    for part in key.split("."):
        value = value.get(part, _Absent) if isinstance(value, Mapping) else _Absent
    if value is _Absent or isinstance(value, (bool, str, list, dict)):
        known = _keys(plain)
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"for example: {', '.join(known[:6])}"
        raise Refused(f"the record has no number called {key!r}", fix=hint)
    return None if value is None else float(value)


class _Absent:
    """Marks a key that does not exist, as None marks a number that does not."""


def _keys(plain: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in plain.items():
        if isinstance(value, Mapping):
            found += _keys(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            found.append(f"{prefix}{key}")
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size_of(path: Path) -> int:
    """Bytes of a file with all its parts, or of all files of a folder."""
    if path.is_file():
        parts = path.parent.glob(path.name.replace("-00001-of-", "-[0-9][0-9][0-9][0-9][0-9]-of-"))
        return sum(p.stat().st_size for p in ([path] if "-00001-of-" not in path.name else parts))
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def calibration_of(path: Path) -> tuple[str | None, dict[str, Any] | None]:
    """The shingles and the facts of the calibration behind a file, as its report tells; None where it does
    not."""
    file = report_path(path)
    try:
        if file.stat().st_size > _LARGEST_REPORT:
            return None, None
        told = json.loads(file.read_text(encoding="utf-8"))["calibration"]
        facts = {key: told[key] for key, kind in _TOLD.items() if isinstance(told.get(key), kind)}
        seen = told.get("shingles")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None
    return (seen if isinstance(seen, str) else None), facts
