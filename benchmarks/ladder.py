"""A publisher's ladder on a small machine: ten GGUF types made, measured and reported by one command.

    python benchmarks/ladder.py [--work FOLDER] [--threads 2] [--windows 12] [--recipes Q4_0 Q8_0 ...]

Runs `bitmill sweep smollm2 --ladder gguf` in a process of its own, with its defaults, and writes
docs/evidence/ladder.json and ladder.md. An earlier sweep's folder is removed first: what is taken over is not
timed. With --recipes, --model or other --windows it is tried small, and writes into the work folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compare import EVIDENCE, machine, signature
from ruler import write_json

AIM = 25 * 60  # seconds for ten tiers on two cores
NOTES = """`bitmill sweep smollm2 --ladder gguf`: ten types of the embedded SmolLM2-135M-Instruct, measured
against it and reported, in one process with the defaults (one importance matrix of 128 windows of 512 tokens;
12 windows of 512 of each of four kinds of text, the second half scored). The source is stored in `Q4_1`
itself, whose losses are not in these numbers, and its rows of 576 are no multiple of 256: where a K-quant
does not fit, llama.cpp's rules take a type of 32. KLD in nats a token, with 95 % intervals over windows."""


def main() -> None:
    """Run the sweep and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--recipes", nargs="+", default=[])
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    folder = options.work / "ladder"
    if folder.exists():
        shutil.rmtree(folder)
    what = options.recipes or ["--ladder", "gguf"]
    words = [sys.executable, "-m", "bitmill", "sweep", options.model, *what, "-o", str(folder)]
    words += ["--windows", str(options.windows), "--json"]
    threads = {"OMP_NUM_THREADS": str(options.threads), "NUMBA_NUM_THREADS": str(options.threads)}
    load, started = os.getloadavg()[0], time.monotonic()
    run = subprocess.run(words, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - started
    told = json.loads(run.stdout)
    about = {**machine(), "threads": options.threads}
    page = folder / "index.html"
    found = {"about": about, "seconds": seconds, "load_before": load, "page_bytes": page.stat().st_size}
    small = bool(options.recipes) or options.windows != 12 or options.model != "smollm2"
    out = options.work if small else EVIDENCE
    write_json(out / "ladder.json", {**found, "sweep": told})
    text = "\n\n".join(
        ["# A ladder of GGUF types", NOTES, verdict(found, told), table(told), signature(about)]
    )
    (out / "ladder.md").write_text(text + "\n", encoding="utf-8")
    print(verdict(found, told))
    print(table(told))


def verdict(found: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """How long it took, and of what."""
    making, measuring = (sum(t["seconds"][part] for t in told["tiers"]) for part in ("making", "measuring"))
    rest = found["seconds"] - making - measuring
    return (
        f"{len(told['tiers'])} tiers in {_clock(found['seconds'])} (aim {_clock(AIM)}): making "
        f"{_clock(making)}, measuring {_clock(measuring)}, the rest (calibration, the original, speed, page) "
        f"{_clock(rest)}; load before {found['load_before']:.1f}. The page has "
        f"{found['page_bytes'] / 1e6:.2f} MB. Noise floor {told['floor']:.2g}."
    )


def table(told: Mapping[str, Any]) -> str:
    """One line a tier."""
    lines = ["| tier | MB | bits | KLD | same choice | tokens/s | stands |", "|---|--:|--:|--:|--:|--:|---|"]
    for tier in told["tiers"]:
        kld, where, speed = tier["kld"], tier["standing"], tier["speed"]
        ends = kld["ci95"]
        span = f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
        stands = (
            "front, knee"
            if where["knee"]
            else "front"
            if where["front"]
            else f"beaten by {where['beaten_by']}"
        )
        stands += ", within chance" if where["beaten_by"] and not where["settled"] else ""
        rate = f"{speed['decode']['mean']:.0f}, {speed['evidence']}" if speed and speed["decode"] else "–"
        cells = (
            tier["name"],
            f"{tier['bytes'] / 1e6:.1f}",
            f"{tier['bpw']:.2f}",
            f"{kld['mean']:.4f}{span}",
            f"{100 * tier['same_top']:.1f} %",
            rate,
            stands,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d} min"


if __name__ == "__main__":
    main()
