"""AutoRound against Intel's auto-round: the same tokens, grids, steps and windows a step.

python benchmarks/bench_autoround.py [--bits 4 2] [--steps 200] [--batch 8] [--windows 64] [--work FOLDER]
    [--reuse]
"""

from __future__ import annotations

from compare import against, arguments, bench

NOTES = """The same {windows} windows of 512 tokens of Python's manual, one side after the other; steps and
windows a step as the rows say, group 64, asymmetric, ranges learned. Bitmill holds an eighth of the windows
back to choose the step that it keeps. `seconds` is the peer's `quantize` call alone, and all of
`bitmill.quantize` with reading the model and writing the file; `whole` are the two processes from first line
to last. KLD in nats against the original: `docs` is the calibration's kind of text, `other` is not."""


def main() -> None:
    """Both sides of every run."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--runs", nargs="+", default=["4:200:8", "2:200:8"], help="bits, steps, windows a step"
    )
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    options = parser.parse_args()
    both = bench(options)
    both.take(options.windows)
    ratios = []
    for run in options.runs:
        bits, steps, batch = run.split(":")
        grid = f"int{bits}-g64-asym"
        told = f"{grid}, {steps} steps of {batch}"
        extra = ("--bits", bits, "--steps", steps, "--batch", batch)
        theirs = both.peer("autoround", "peer_autoround.py", f"auto-round {told}", *extra)
        solver = f"autoround(steps={steps}, batch={batch})"
        ours = both.bitmill(f"{solver} : {grid} > compressed-tensors", f"bitmill autoround {told}")
        ratios.append(f"{against(told, ours, theirs)}.")
    both.report(
        "autoround",
        "AutoRound, side by side",
        NOTES.format(windows=options.windows) + "\n\n" + "\n".join(ratios),
    )


if __name__ == "__main__":
    main()
