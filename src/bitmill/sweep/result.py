"""What a sweep knows of one finished tier, beside its file: the next sweep takes it over."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bitmill.measurement.logits import Bootstrap, Floats, Ids
from bitmill.measurement.record import Record

_LARGEST = 64 << 20
WORK = ".sweep"


@dataclass(frozen=True, eq=False)
class Result:
    """A tier that was made and measured.

    Attributes:
        name, asked, recipe, file: of the tier.
        key: of all that its numbers follow from; another key makes and measures it again.
        bytes_: of the output.
        told: what it was calibrated on, in words.
        record: the measurement's plain values.
        report: what of the run's report a reader of the sweep wants: error by tensor, notes.
        made, measured: seconds of making it and of measuring it.
    """

    name: str
    asked: str
    recipe: str
    file: str
    key: str
    bytes_: int
    told: str
    record: Mapping[str, Any]
    report: Mapping[str, Any]
    made: float
    measured: float

    @property
    def kld(self) -> float:
        """Mean KL divergence, nats a token."""
        return float(self.record["kld"]["mean"])


def result_path(folder: Path, file: str) -> Path:
    """Where the result of an output lies."""
    return folder / f"{file}.measured.json"


def losses_path(folder: Path, file: str) -> Path:
    """Where its losses position by position lie."""
    return folder / WORK / f"{file}.losses.safetensors"


def keep(folder: Path, result: Result, record: Record) -> None:
    """Write a result beside its output: what is compared later first, the record last."""
    losses = losses_path(folder, result.file)
    losses.parent.mkdir(parents=True, exist_ok=True)
    p = record.positions
    kinds = list(dict.fromkeys(record.kind_of_window))
    stratum = np.array([kinds.index(kind) for kind in record.kind_of_window], np.int64)
    arrays: dict[str, NDArray[Any]] = {
        "kld": p.kld,
        "window": p.window,
        "finite": p.finite.astype(np.uint8),
        "stratum": stratum,
    }
    unfinished = losses.with_name(f"{losses.name}.{os.getpid()}")
    save_file(arrays, unfinished)
    unfinished.replace(losses)
    path = result_path(folder, result.file)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(vars(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def kept(folder: Path, file: str, key: str | None, bytes_: int | None) -> Result | None:
    """The result that lies beside an output, if it has this key and the output this size."""
    path = result_path(folder, file)
    try:
        if path.stat().st_size > _LARGEST:
            return None
        found = Result(**json.loads(path.read_text(encoding="utf-8")))
        whole = found.file == file and (folder / file).exists()
        right = (key is None or found.key == key) and (bytes_ is None or found.bytes_ == bytes_)
        return found if whole and right and found.kld >= 0 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def difference(folder: Path, one: Result, other: Result) -> tuple[float, float] | None:
    """The 95 % interval of the first's mean loss less the second's, by a paired bootstrap over windows;
    None where positions were not kept or are not the same."""
    a, b = (_losses(losses_path(folder, result.file)) for result in (one, other))
    if a is None or b is None:
        return None
    if len(a["kld"]) != len(b["kld"]) or not np.array_equal(a["window"], b["window"]):
        return None
    both = (a["finite"] > 0) & (b["finite"] > 0)
    if not both.any():
        return None
    window: Ids = a["window"][both]
    apart: Floats = a["kld"][both] - b["kld"][both]
    boot = Bootstrap(window, a["stratum"])
    return boot.interval(boot.means(apart))


def _losses(path: Path) -> Mapping[str, Any] | None:
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    names = {"kld", "window", "finite", "stratum"}
    if set(found) != names or found["kld"].ndim != 1 or not len(found["stratum"]):
        return None
    inside = len(found["window"]) == len(found["kld"]) == len(found["finite"])
    return found if inside and found["window"].max(initial=0) < len(found["stratum"]) else None
