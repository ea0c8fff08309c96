"""Plain 4-bit integers against torchao's and MLX's: groups of 64, no calibration.

python benchmarks/bench_plain.py [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import arguments, bench

PEERS = {
    "torchao": ("int4-g64-asym", ("nearest", "hqq")),
    "mlx": ("int4-g64-bias", ("nearest", "clip")),
}
NOTES = """Both sides without calibration; scales of both in the type the container gives them from a float32
model. The peer's seconds are its quantizing calls, in memory; Bitmill's are all of `bitmill.quantize` with
reading the model and writing the folder; `whole` are the two processes from first line to last. KLD in nats
against the original on two kinds of text."""


def main() -> None:
    """Run both sides of each."""
    options = arguments(__doc__).parse_args()
    both = bench(options)
    for name, (grid, solvers) in PEERS.items():
        both.peer(name, f"peer_{name}.py", f"{name} {grid}")
        for solver in solvers:
            both.bitmill(f"{solver} : {grid} > {name}", f"bitmill {solver} {grid} > {name}", "--plain")
    both.report("plain", "Plain 4-bit integers, side by side", NOTES)


if __name__ == "__main__":
    main()
