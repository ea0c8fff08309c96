"""The account of one run, as it is handed back and as it is stored beside the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from bitmill.core.types import Note
from bitmill.expert_coverage import coverage


@dataclass(frozen=True)
class Report:
    """The account of one run.

    Attributes:
        path: what was written.
        plan: the plan's plain values.
        calibration: source, counts and hash of the tokens.
        notes: everything that did not go as asked.
        tensors: error of each solved weight: ``relative`` (Frobenius), ``weighted`` (by mean square of the
        input); of an expert's, the ``tokens`` that it was placed by, and how many it was ``sent``.
        blocks: output error of each block relative to its own contribution, when it was run.
        seconds: wall time of this process.
        resumed: units taken over from an interrupted run.
        tuning: what a last step with the whole model did, and how it was judged; empty without one.
    """

    path: str
    plan: Mapping[str, Any]
    calibration: Mapping[str, Any]
    notes: tuple[Note, ...]
    tensors: Mapping[str, Mapping[str, float]]
    blocks: Mapping[str, float]
    seconds: float
    resumed: int
    identity: Mapping[str, Any]
    tuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes_(self) -> int:
        """Exact size of the output."""
        return int(self.plan["bytes"])

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored beside the output."""
        return {
            "path": self.path,
            "plan": dict(self.plan),
            "calibration": dict(self.calibration),
            "notes": [vars(note) for note in self.notes],
            "tensors": {name: dict(error) for name, error in self.tensors.items()},
            "blocks": dict(self.blocks),
            **({"experts": found} if (found := coverage(self.tensors)) else {}),
            "seconds": self.seconds,
            "resumed": self.resumed,
            "identity": dict(self.identity),
            **({"tuning": dict(self.tuning)} if self.tuning else {}),
            "bitmill": version("bitmill"),
        }
