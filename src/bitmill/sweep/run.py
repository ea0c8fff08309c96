"""A sweep from a model and recipes to files, their measurements and where each stands."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitmill.advise.speed import Speed
from bitmill.calibrate.importance import take_imatrix
from bitmill.calibrate.tokens import calibration_tokens
from bitmill.checkpoint.imatrix import write_imatrix
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.measurement.measure import measure_all, text_windows
from bitmill.recipe import parse
from bitmill.source import open_source
from bitmill.sweep.errand import Drawn, Errand, Measuring, Progress
from bitmill.sweep.front import Point, Standing, largest_within, standings
from bitmill.sweep.planned import Forecast, LeftOut, Placed, forecast, grouped, key_of, place
from bitmill.sweep.result import WORK, Result, difference, kept
from bitmill.sweep.tiers import Tier, tiers
from bitmill.sweep.words import MATRIX, named, sweep_command, tier_command
from bitmill.sweep.workers import in_processes, on_ray, one_by_one, refuse_cluster

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for.

    Attributes:
        model, revision: the source.
        recipes: names or lines.
        folder: where everything goes.
        drawn, measuring: how to calibrate and measure.
        importance: whether plain recipes for GGUF get the importance matrix, too.
        forgiving: whether what the model cannot have is left out, as of a ladder.
        jobs: processes; ``ray`` is a cluster's address instead.
        budget: bytes that the best is wanted within; 0 for none.
        force: replace outputs of other recipes.
    """

    model: str
    recipes: tuple[str, ...]
    folder: Path
    drawn: Drawn
    measuring: Measuring
    revision: str | None = None
    importance: bool = True
    forgiving: bool = False
    jobs: int = 1
    ray: str | None = None
    budget: int = 0
    force: bool = False


@dataclass(frozen=True, eq=False)
class Prospect:
    """A sweep before any weight is read: what would be made, what is left out, what it takes."""

    source: Checkpoint
    placed: tuple[Placed, ...]
    left: tuple[LeftOut, ...]
    forecast: Forecast


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished sweep.

    Attributes:
        results: of every tier, the smallest first.
        standings: by the tier's name.
        speeds: the same, where one is known.
        best: the tier that loses least within the budget; None without one, or where none fits.
        pairs: neighbours in size, with the interval of their difference.
    """

    asked: Asked
    source: Checkpoint
    results: tuple[Result, ...]
    standings: Mapping[str, Standing]
    left: tuple[LeftOut, ...]
    seconds: float
    best: str | None
    pairs: tuple[tuple[str, str, tuple[float, float] | None], ...]
    speeds: Mapping[str, Speed] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values: what stands in ``sweep.json``."""
        first = self.results[0].record
        facts = {"reference": first["reference"], "bytes_reference": first["bytes_reference"]}
        return {
            "bitmill": version("bitmill"),
            "model": named(self.asked.model),
            "command": sweep_command(self.asked),
            **facts,
            "floor": first["floor"],
            "protocol": first["protocol"],
            "corpus": first["corpus"],
            "tokens": first["tokens"],
            "budget": self.asked.budget or None,
            "best_within_budget": self.best,
            "seconds": self.seconds,
            "tiers": [self.tier(result) for result in self.results],
            "neighbours": [
                {"smaller": a, "larger": b, "kld_difference_ci95": None if ci is None else list(ci)}
                for a, b, ci in self.pairs
            ],
            "left_out": [vars(one) for one in self.left],
        }

    def tier(self, result: Result) -> dict[str, Any]:
        """One tier's line as plain values."""
        record, speed = result.record, self.speeds.get(result.name)
        tier = Tier(result.name, result.asked, parse(result.recipe), result.file)
        keys = ("bpw", "bpw_linears", "kld", "same_top", "same_top_se", "ppl", "ppl_reference")
        return {
            "name": result.name,
            "recipe": result.recipe,
            "file": result.file,
            "calibrated_on": result.told,
            "command": tier_command(self.asked, tier, result.told),
            "bytes": result.bytes_,
            **{key: record[key] for key in keys},
            "worst_kind": record["worst_kind"],
            "worst_kld": record["worst"]["kld"]["mean"],
            "speed": None if speed is None else speed.to_json(),
            "seconds": {"making": result.made, "measuring": result.measured},
            "standing": self.standings[result.name].to_json(),
        }


def prospect(asked: Asked) -> Prospect:
    """What a sweep would make; only headers are read.

    Raises:
        Refused: something the user can change.
    """
    source = open_source(asked.model, revision=asked.revision)
    wanted = tiers(source.path, asked.recipes)
    how = {"importance": asked.importance, "forgiving": asked.forgiving}
    placed, left = place(source, wanted, asked.folder, asked.drawn, **how)
    return Prospect(source, placed, left, forecast(source, placed, asked.drawn, asked.measuring))


def sweep(
    asked: Asked,
    found: Prospect,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Make and measure every tier; what is finished already is taken over.

    Args:
        found: of the same ``asked``.
        progress: called as ``progress(event, done, total, text)``.
        note: told in a sentence what was taken over.

    Raises:
        Refused: an output is there that this sweep did not make; there is no such cluster.
        Interrupted: a clean stop; the same sweep goes on.
    """
    began = time.monotonic()
    if asked.ray is not None:
        refuse_cluster(asked.ray)
    how, source = asked.measuring, found.source
    corpus = text_windows(source, how.texts, how.protocol)
    keys = {p.tier.file: key_of(p, asked.drawn, how, corpus, source.digest) for p in found.placed}
    done = [kept(asked.folder, p.tier.file, keys[p.tier.file], p.plan.bytes_) for p in found.placed]
    results = [result for result in done if result is not None]
    if results:
        note(f"{len(results)} of {len(done)} tiers are there already: {', '.join(r.name for r in results)}")
    missing = [p for p, result in zip(found.placed, done, strict=True) if result is None]
    if missing:
        asked.folder.mkdir(parents=True, exist_ok=True)
        matrix = _matrix(asked, source, progress) if any(p.matrix for p in missing) else None
        measure_all(
            [], source, texts=how.texts, protocol=how.protocol, device=asked.drawn.device,
            progress=_within("original", progress), kept=how.kept,
        )  # fmt: skip
        errands = [_errand(asked, group, keys, matrix) for group in grouped(missing)]
        results += _carried(asked, errands, len(found.placed), len(results), progress)
    return outcome(asked, source, results, found.left, time.monotonic() - began)


def outcome(
    asked: Asked, source: Checkpoint, results: Sequence[Result], left: Sequence[LeftOut], seconds: float
) -> Outcome:
    """Where each result stands among the others."""
    ordered = sorted(results, key=lambda r: (r.bytes_, r.kld))
    points = [Point(r.name, r.bytes_, r.kld) for r in ordered]
    by_name = {r.name: r for r in ordered}
    found = standings(points, lambda one, other: difference(asked.folder, by_name[one], by_name[other]))
    best = largest_within(points, asked.budget) if asked.budget else None
    pairs = tuple((a.name, b.name, difference(asked.folder, a, b)) for a, b in pairwise(ordered))
    return Outcome(
        asked=asked,
        source=source,
        results=tuple(ordered),
        standings=found,
        left=tuple(left),
        seconds=seconds,
        best=None if best is None else best.name,
        pairs=pairs,
    )


def write(outcome: Outcome) -> Path:
    """``sweep.json`` in the sweep's folder, all at once."""
    path = outcome.asked.folder / SWEEP
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(
        json.dumps(outcome.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    unfinished.replace(path)
    return path


def _carried(
    asked: Asked, errands: Sequence[Errand], total: int, done: int, progress: Progress
) -> list[Result]:
    def tell(event: str, step: int, steps: int, text: str) -> None:
        doing = {"measure": "measuring", "tensors": "comparing tensors"}.get(event, "making")
        current = errands[min(len(finished), len(errands) - 1)].name
        progress("tier", done + sum(map(len, finished)), total, f"{current}: {doing} {step}/{steps}")

    finished: list[tuple[Result, ...]] = []
    progress("tier", done, total, errands[0].name)
    if asked.ray is not None:
        coming = on_ray(errands, asked.ray)
    elif asked.jobs > 1:
        coming = in_processes(errands, min(asked.jobs, len(errands)))
    else:
        coming = one_by_one(errands, tell)
    for results in coming:
        finished.append(results)
        made = done + sum(map(len, finished))
        progress("tier", made, total, ", ".join(f"{r.name}: KLD {r.kld:.4g}" for r in results))
    return [result for results in finished for result in results]


def _errand(asked: Asked, group: Sequence[Placed], keys: Mapping[str, str], matrix: Path | None) -> Errand:
    return Errand(
        model=asked.model,
        revision=asked.revision,
        folder=asked.folder,
        tiers=tuple(p.tier for p in group),
        keys=tuple(keys[p.tier.file] for p in group),
        sizes=tuple(p.plan.bytes_ for p in group),
        matrix=matrix if group[0].matrix else None,
        drawn=asked.drawn,
        measuring=asked.measuring,
        told=group[0].told,
        force=asked.force,
    )


def _matrix(asked: Asked, source: Checkpoint, progress: Progress) -> Path:
    """The sweep's importance matrix: the one that is there if it is of the same text, else taken now."""
    path = asked.folder / MATRIX
    drawn = asked.drawn
    calib = None if drawn.calib is None else list(drawn.calib)
    windows: dict[str, Any] = {
        "nsamples": drawn.nsamples,
        "seqlen": drawn.seqlen,
        "seed": drawn.seed,
        "chat": drawn.chat,
    }
    tokens = calibration_tokens(source, calib, **windows, progress=progress)
    identity = {"model": source.digest, "tokens": tokens.facts.get("sha256", ""), **windows}
    known = asked.folder / WORK / "imatrix.json"
    if path.is_file() and known.is_file():
        told = json.loads(known.read_text(encoding="utf-8"))
        if told == {**identity, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}:
            return path
    if path.exists() and not known.is_file() and not asked.force:
        raise Refused(
            f"{str(path)!r} exists, and no sweep made it", fix="add --force to replace it, or another -o"
        )
    write_imatrix(path, take_imatrix(source, tokens, drawn.device, progress).imatrix, "gguf")
    known.parent.mkdir(parents=True, exist_ok=True)
    content = {**identity, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    known.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return path


def _within(event: str, progress: Progress) -> Progress:
    return lambda _, done, total, text: progress(event, done, total, text)
