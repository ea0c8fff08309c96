"""Calibrate once, write three files, and compare them in pairs on the same text.

python examples/one_calibration.py MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitmill
from bitmill.measurement.compare import compare
from bitmill.measurement.measure import measure_all

RECIPES = {
    "plain.gguf": "nearest : q4_0 > gguf",
    "gptq.gguf": "gptq : q4_0 > gguf",
    "gptq-5bit.gguf": "gptq : q5_0 > gguf",
}


def main(model: str, folder: Path) -> None:
    """Three files from one set of moments."""
    folder.mkdir(parents=True, exist_ok=True)
    moments = folder / "moments.safetensors"
    bitmill.quantize(model, "gptq : q4_0 > gguf", folder / "first.gguf", nsamples=32, save=moments)
    for name, recipe in RECIPES.items():
        report = bitmill.quantize(model, recipe, folder / name, moments=moments)
        print(f"{name}: {report.bytes_:,} bytes in {report.seconds:.0f} s")
    records = measure_all([str(folder / name) for name in RECIPES], model)
    for record in records[1:]:
        found = compare(records[0], record)
        print(f"{found.first} - {found.second}: {found.kld_difference:.4f} nats, 95 % {found.ci95}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
