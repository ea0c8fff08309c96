"""One piece of a sweep's work: tiers that are solved together, made and measured, by any process that sees
the folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitmill.account import Report
from bitmill.measurement.measure import Protocol, measure_all
from bitmill.measurement.record import Record
from bitmill.measurement.states import Kept
from bitmill.several import quantize_many
from bitmill.source import open_source
from bitmill.sweep.result import Result, keep
from bitmill.sweep.tiers import Tier

Progress = Callable[[str, int, int, str], None]
NOTES = 20  # of a run's report that a result repeats


@dataclass(frozen=True)
class Drawn:
    """How a sweep calibrates, as of :func:`bitmill.quantize`."""

    calib: tuple[str, ...] | None = None
    nsamples: int = 128
    seqlen: int = 512
    seed: int = 0
    chat: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Measuring:
    """How a sweep measures: on which texts, by which protocol, and where the original's states lie."""

    texts: tuple[str, ...] | None
    protocol: Protocol
    kept: Kept


@dataclass(frozen=True)
class Errand:
    """Tiers that share a solution, mostly one, and all that another process needs to make them.

    Attributes:
        model, revision: the source.
        folder: of the sweep.
        tiers, keys, sizes: what to make, the key of each result, and each output's bytes.
        matrix: the importance matrix that tells them about their inputs; None where they calibrate, or need
            nothing.
        drawn, measuring: how.
        told: what they are calibrated on, in words.
        threads: how many torch may use; 0 leaves that as it is.
        force: replace outputs of other recipes.
    """

    model: str
    revision: str | None
    folder: Path
    tiers: tuple[Tier, ...]
    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    matrix: Path | None
    drawn: Drawn
    measuring: Measuring
    told: str
    threads: int = 0
    force: bool = False

    @property
    def name(self) -> str:
        """Of its tiers."""
        return ", ".join(tier.name for tier in self.tiers)


def carry(errand: Errand, progress: Progress = lambda *_: None) -> tuple[Result, ...]:
    """Make the tiers of an errand, measure each, and leave its result beside it.

    Raises:
        Refused: an output is there that this sweep did not make.
        Interrupted: a clean stop; the same sweep goes on.
    """
    if errand.threads:
        torch.set_num_threads(errand.threads)
    source = open_source(errand.model, revision=errand.revision)
    reports = quantize_many(
        source,
        [tier.recipe for tier in errand.tiers],
        [errand.folder / tier.file for tier in errand.tiers],
        **_calibration(errand),
        device=errand.drawn.device,
        force=errand.force,
        progress=progress,
    )
    results = []
    for at, (tier, report) in enumerate(zip(errand.tiers, reports, strict=True)):
        begun = time.monotonic()
        record = measure_all(
            [report.path],
            source,
            texts=errand.measuring.texts,
            protocol=errand.measuring.protocol,
            device=errand.drawn.device,
            progress=progress,
            kept=errand.measuring.kept,
        )[0]
        clock = (report.seconds, time.monotonic() - begun)
        result = _result(errand, at, tier, report, record, clock)
        keep(errand.folder, result, record)
        results.append(result)
    return tuple(results)


def _calibration(errand: Errand) -> dict[str, Any]:
    if errand.matrix is not None:
        return {"imatrix": errand.matrix}
    drawn = errand.drawn
    calib = None if drawn.calib is None else list(drawn.calib)
    windows = {"nsamples": drawn.nsamples, "seqlen": drawn.seqlen}
    return {"calib": calib, **windows, "seed": drawn.seed, "chat": drawn.chat}


def _result(
    errand: Errand,
    at: int,
    tier: Tier,
    report: Report,
    record: Record,
    clock: tuple[float, float],
) -> Result:
    return Result(
        name=tier.name,
        asked=tier.asked,
        recipe=str(tier.recipe),
        file=tier.file,
        key=errand.keys[at],
        bytes_=errand.sizes[at],
        told=errand.told,
        record=record.to_json(),
        report=of_interest(report),
        made=clock[0],
        measured=clock[1],
    )


def of_interest(report: Report) -> dict[str, Any]:
    """What a reader wants of a run's report beside the measurement: output errors, what went otherwise."""
    weighted = {name: error["weighted"] for name, error in report.tensors.items() if "weighted" in error}
    return {"weighted": weighted, "notes": [vars(note) for note in report.notes[:NOTES]]}
