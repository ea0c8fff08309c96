"""What a plan says a run will take, against what it took: memory, disk and time, as ratios.

Every recipe is planned (``bitmill plan``, and ``--time``, which does some blocks to know better) and then run
(``bitmill quantize --no-measure``), each in a process of its own. Memory is the process' anonymous memory,
read 50 times a second; disk is everything in the run's folder; time is the run's own, from opening the source
to the sealed file.

    python benchmarks/forecast.py MODEL SCRATCH [--recipe NAME ...] [--nsamples 128] [--seqlen 512]

Nothing else should run on the machine: a block that is timed beside other work is not the block of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare import EVIDENCE, HERE, machine, signature
from memory import watched
from ruler import write_json

RECIPES = {
    "rtn": "nearest : int4-g64-asym > compressed-tensors",
    "gptq": "gptq : int4-g64-asym > compressed-tensors",
    "awq": "awq + nearest : int4-g64-asym > compressed-tensors",
    "hqq": "hqq : int4-g64-fz > hqq",
    "imatrix": "Q4_K_M",
    "best": "best : Q4_K_M",
}
WITH_MATRIX = {"imatrix"}
AIMS = {"memory": 0.20, "time": 0.40}
PERIOD = 0.1  # seconds between two looks at the disk
MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """One model, one calibration."""

    model: str
    scratch: Path
    nsamples: int
    seqlen: int
    calib: Path

    @property
    def windows(self) -> list[str]:
        """The options for it."""
        return ["--nsamples", str(self.nsamples), "--seqlen", str(self.seqlen)]

    @property
    def matrix(self) -> Path:
        """An importance matrix of the model."""
        return self.scratch / "imatrix.gguf"

    def told(self, name: str) -> list[str]:
        """What a run of a recipe calibrates on."""
        return ["--imatrix", str(self.matrix)] if name in WITH_MATRIX else self.windows


def bitmill(*words: str) -> list[str]:
    """The command as a process."""
    return [sys.executable, "-m", "bitmill", *words]


def own_text(path: Path) -> Path:
    """The repository's own pages and sources as one text: long enough for any calibration here."""
    root = HERE.parent
    files = sorted([*root.glob("docs/**/*.md"), *root.glob("src/**/*.py")])
    path.write_text("\n\n".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
    return path


def predicted(setting: Setting, name: str, timed: bool) -> dict[str, float]:
    """What the plan says: MiB of memory and disk, seconds."""
    words = ["plan", setting.model, RECIPES[name], *setting.told(name), "--json"]
    run = subprocess.run(bitmill(*words, *["--time"] * timed), capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"plan {name}: {run.stderr}")
    plan = json.loads(run.stdout)
    return {
        "memory": plan["peak_bytes"]["value"] / MIB,
        "disk": plan["disk_bytes"]["value"] / MIB,
        "time": plan["seconds"]["value"],
    }


class _Disk:
    """Watches how much lies in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stop, self.peak = folder, threading.Event(), 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(PERIOD):
            self.peak = max(self.peak, sum(_size(Path(e.path)) for e in os.scandir(self._folder)))


def _size(path: Path) -> int:
    """Bytes of a file, or below a folder; what vanishes meanwhile counts nothing."""
    try:
        if path.is_dir():
            return sum(_size(Path(entry.path)) for entry in os.scandir(path))
        return path.stat().st_size
    except OSError:
        return 0


def measured(setting: Setting, name: str) -> dict[str, float]:
    """What the run takes."""
    folder = setting.scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    told = setting.told(name) + ([] if name in WITH_MATRIX else ["--calib", str(setting.calib)])
    words = ["quantize", setting.model, RECIPES[name], "-o", str(folder / "out.gguf"), *told, "--no-measure"]
    if " > " in RECIPES[name]:
        words[4] = str(folder / "out")
    if RECIPES[name].startswith(("nearest", "hqq")):
        words = [word for word in words if word not in ("--calib", str(setting.calib))]
    with _Disk(folder) as disk:
        facts = watched(bitmill(*words, "--json"), setting.scratch / "log.json")
    log = (setting.scratch / "log.json").read_text(encoding="utf-8")
    report = json.loads(log[log.index("\n{\n") if not log.startswith("{") else 0 :])
    shutil.rmtree(folder)
    return {"memory": facts["anonymous_mib"], "disk": disk.peak / MIB, "time": float(report["seconds"])}


def main() -> None:
    """Plan and run each recipe; print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path, help="room for a quantized model; emptied at the end")
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    scratch = options.scratch / "bitmill-forecast"
    scratch.mkdir(parents=True, exist_ok=True)
    text = own_text(scratch / "text.txt")
    setting = Setting(options.model, scratch, options.nsamples, options.seqlen, text)
    if WITH_MATRIX & set(options.recipe):
        words = ["imatrix", setting.model, "-o", str(setting.matrix), "--calib", str(text), *setting.windows]
        subprocess.run(bitmill(*words, "--force"), check=True)
    rows = []
    for name in options.recipe:
        load = os.getloadavg()[0]
        plain, timed = predicted(setting, name, False), predicted(setting, name, True)
        started = time.monotonic()
        found = measured(setting, name)
        ratio = {key: timed[key] / found[key] for key in found}
        row = {"recipe": RECIPES[name], "name": name, "predicted": timed, "measured": found, "ratio": ratio}
        row |= {"modelled_time_ratio": plain["time"] / found["time"], "load": load}
        rows.append({**row, "process_seconds": time.monotonic() - started})
        print(name, {key: f"{value:.2f}" for key, value in ratio.items()}, flush=True)
        _report(options.evidence, setting, rows)
    shutil.rmtree(scratch)


def _report(evidence: Path, setting: Setting, rows: Sequence[dict[str, Any]]) -> None:
    about = {
        **machine(),
        "threads": os.cpu_count(),
        "model": Path(setting.model).name,
        "windows": setting.nsamples,
        "tokens": setting.seqlen,
    }
    evidence.mkdir(parents=True, exist_ok=True)
    write_json(evidence / "forecast.json", {"about": about, "aims": AIMS, "rows": list(rows)})
    lines = [
        "# Forecast against reality",
        "",
        f"Ratios of what `bitmill plan --time` says a run on {about['model']} takes to what it took, "
        f"{setting.nsamples} windows of {setting.seqlen} tokens; 1 is right, below 1 is too little. "
        f"Aims: memory within {AIMS['memory']:.0%}, time within {AIMS['time']:.0%}.",
        "",
        "| recipe | memory | MiB taken | disk | MiB taken | time, blocks timed | time, modelled "
        "| seconds taken | load before |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ratio, found = row["ratio"], row["measured"]
        missed = [key for key, aim in AIMS.items() if abs(ratio[key] - 1) > aim]
        mark = f" ({' and '.join(missed)} missed)" if missed else ""
        lines.append(
            f"| `{row['recipe']}`{' with an importance matrix' if row['name'] in WITH_MATRIX else ''}{mark} "
            f"| {ratio['memory']:.2f} | {found['memory']:,.0f} | {ratio['disk']:.2f} | {found['disk']:,.0f} "
            f"| {ratio['time']:.2f} | {row['modelled_time_ratio']:.2f} | {found['time']:,.1f} "
            f"| {row['load']:.1f} |"
        )
    (evidence / "forecast.md").write_text("\n".join([*lines, "", signature(about), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
