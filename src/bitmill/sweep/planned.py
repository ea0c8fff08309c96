"""Before a sweep's first weight is read: every tier's plan, what is left out, what it takes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitmill.calibrate.windows import Windows
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BitmillError, Refused
from bitmill.forecast import RATE, refuse_folder
from bitmill.measurement.measure import FLOOR_WINDOWS
from bitmill.mill import Told
from bitmill.planning import Plan, plan
from bitmill.several import solved_alike
from bitmill.sweep.errand import Drawn, Measuring
from bitmill.sweep.tiers import Tier, takes_matrix

COMPARED = 30e6  # weights a second a core that are decoded and compared with the original's


@dataclass(frozen=True, eq=False)
class Placed:
    """A tier and its plan; ``matrix`` says whether the sweep's importance matrix tells it of its inputs."""

    tier: Tier
    plan: Plan
    matrix: bool

    @property
    def told(self) -> str:
        """What it is calibrated on, in words."""
        if self.matrix:
            return "importance matrix"
        return "nothing" if self.plan.needs == "nothing" and self.plan.recipe.tune is None else "text"


@dataclass(frozen=True)
class LeftOut:
    """A tier of a ladder that this model cannot have, and why."""

    name: str
    why: str


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a sweep takes, as modelled: seconds of each part, bytes on disk, peak memory."""

    calibrating: float
    reference: float
    making: tuple[float, ...]
    measuring: float
    disk_bytes: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """All of it, one tier after the other."""
        return self.calibrating + self.reference + sum(self.making) + self.measuring * len(self.making)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "making": list(self.making), "seconds": self.seconds}


def place(
    source: Checkpoint,
    tiers: Sequence[Tier],
    folder: Path,
    drawn: Drawn,
    *,
    importance: bool,
    forgiving: bool,
) -> tuple[tuple[Placed, ...], tuple[LeftOut, ...]]:
    """The plan of every tier.

    Args:
        importance: whether every recipe that an importance matrix can tell something gets it, and not only
            those that cannot do without.
        forgiving: whether a tier that the model cannot have is left out and named, rather than refused.

    Raises:
        Refused: a tier is, all are, or the disk is too small for them.
    """
    placed, left = [], []
    calib = None if drawn.calib is None else list(drawn.calib)
    how = (calib, drawn.nsamples, drawn.seqlen, drawn.seed, drawn.chat, None)
    plain = Told.of(*how, (), "plain")
    matrix = Told.of(None, *how[1:], (folder / "imatrix.gguf",), "plain")
    for tier in tiers:
        try:
            use = takes_matrix(tier.recipe) and (importance or _blind(tier, source))
            made = (matrix if use else plain).plan(tier.recipe, source, folder / tier.file, False)
        except BitmillError as error:
            if not forgiving:
                raise
            left.append(LeftOut(tier.name, error.what))
            continue
        placed.append(Placed(tier, made, use))
    if not placed:
        raise Refused(
            f"none of {len(tiers)} tiers can be made of this model", where=left[0].why, fix="name a recipe"
        )
    missing = [p.plan.bytes_ for p in placed if not (folder / p.tier.file).exists()]
    refuse_folder(folder / "sweep.json", sum(missing))
    return tuple(placed), tuple(left)


def _blind(tier: Tier, source: Checkpoint) -> bool:
    """Whether the tier holds types that nobody rounds without knowing the inputs."""
    return plan(tier.recipe, source, None, nsamples=0, seqlen=0).needs != "nothing"


def grouped(placed: Sequence[Placed]) -> list[list[Placed]]:
    """Tiers in order, those together that share a solution."""
    groups: list[list[Placed]] = []
    for one in placed:
        home = next(
            (g for g in groups if g[0].matrix == one.matrix and solved_alike(g[0].plan, one.plan)), None
        )
        if home is None:
            groups.append([one])
        else:
            home.append(one)
    return groups


def forecast(source: Checkpoint, placed: Sequence[Placed], drawn: Drawn, how: Measuring) -> Forecast:
    """What making and measuring them takes on this machine's cores."""
    speed = RATE * (os.cpu_count() or 1)
    weights = sum(math.prod(t.shape) for t in source.tensors.values())
    head = int(source.config.get("vocab_size") or 0) * int(source.config.get("hidden_size") or 0)
    inside = max(weights - head, 1)
    kinds = 4 if how.texts is None else len(how.texts)
    windows, protocol = kinds * how.protocol.count, how.protocol
    scored = protocol.window - protocol.first() - 1
    body = 2.0 * inside * windows * protocol.window
    logits = 2.0 * head * windows * scored
    floor = 2 * kinds * FLOOR_WINDOWS / windows if protocol.floor else 0.0
    tokens = drawn.nsamples * drawn.seqlen if any(p.matrix for p in placed) else 0
    return Forecast(
        calibrating=2.0 * inside * tokens / speed,
        reference=(body * (1 + floor) + logits * 2 * floor) / speed,
        making=tuple(p.plan.seconds for p in placed),
        measuring=(body + 2 * logits) / speed + weights / (COMPARED * (os.cpu_count() or 1)),
        disk_bytes=sum(p.plan.bytes_ for p in placed),
        peak_bytes=max(p.plan.peak_bytes for p in placed),
    )


def key_of(placed: Placed, drawn: Drawn, how: Measuring, corpus: Windows, original: str) -> str:
    """The identity of a tier's numbers: its plan, what it calibrates on, what it is measured on."""
    texts = [[text, _content(text)] for text in drawn.calib or ()]
    calibrated = {**vars(drawn), "calib": texts} if placed.told != "nothing" else {}
    identity = {
        "plan": placed.plan.digest,
        "matrix": placed.matrix,
        "calibration": calibrated,
        "device": drawn.device,
        "protocol": vars(how.protocol),
        "tokens": corpus.facts["sha256"],
        "original": original,
        "bitmill": version("bitmill"),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _content(text: str) -> str:
    """The hash of a calibration file; nothing for the name of a data set."""
    path = Path(text.partition("=")[0]).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
