"""One run of Bitmill as a process of its own: its seconds, its peak memory, its exact size.

    python benchmarks/run_bitmill.py MODEL TOKENS.safetensors OUT RECIPE [--plain | --default] [--threads 2]

``seconds`` is ``bitmill.quantize`` from opening the source to the sealed file: more than the peers'
own figure, which leaves loading and saving out. Imports are in neither.
``--plain`` hands over no calibration tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peer import STARTED, peak_rss_mib
from safetensors.torch import load_file

import bitmill


def block_linear_bpw(plan: bitmill.Plan) -> float:
    """Stored bits a weight over what the solver placed."""
    rows = [row for row in plan.rows if row.solved]
    bits = sum(row.grid.storage_bits((row.shape[0], row.shape[1])) for row in rows)
    return bits / sum(row.shape[0] * row.shape[1] for row in rows)


def main() -> None:
    """Quantize and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path, help="a folder; the model goes into it as 'model' or 'model.gguf'")
    parser.add_argument("recipe")
    parser.add_argument("--plain", action="store_true", help="no calibration")
    parser.add_argument("--default", action="store_true", help="Bitmill's own choice of calibration text")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = None if options.plain or options.default else load_file(options.tokens)["input_ids"]
    name = "model.gguf" if options.recipe.rstrip().endswith("gguf") else "model"
    quantize = bitmill.quantize  # imported when it is first named, and all that it needs with it
    before = time.monotonic()
    report = quantize(options.model, options.recipe, options.out / name, calib=ids, force=True)
    seconds = time.monotonic() - before
    made = bitmill.plan(
        bitmill.parse(options.recipe), bitmill.open_source(options.model), options.out / "again"
    )
    facts = {
        "peer": "bitmill",
        "recipe": options.recipe,
        "file": name,
        "bpw": block_linear_bpw(made),
        "bytes": report.bytes_,
        "notes": len(report.notes),
        "threads": options.threads,
        "seconds": seconds,
        "seconds_whole": time.monotonic() - STARTED,
        "peak_rss_mib": peak_rss_mib(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
