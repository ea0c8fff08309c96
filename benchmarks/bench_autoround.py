"""AutoRound against Intel's auto-round: the same tokens, grids, steps and windows a step.

python benchmarks/bench_autoround.py [--bits 4 2] [--steps 200] [--batch 8] [--windows 64] [--work FOLDER]
    [--reuse]
"""

from __future__ import annotations

from compare import against, arguments, bench

NOTES = """The same {windows} windows of 512 tokens of Python's manual, one side after the other; {steps}
steps of {batch} windows a block, group 64, asymmetric, ranges learned. Bitmill holds an eighth of the windows
back to choose the step that it keeps. `seconds` is the peer's `quantize` call alone, and all of
`bitmill.quantize` with reading the model and writing the file; `whole` are the two processes from first line
to last. KLD in nats against the original: `docs` is the calibration's kind of text, `other` is not."""


def main() -> None:
    """Run both sides at every width."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    options = parser.parse_args()
    both = bench(options)
    both.take(options.windows)
    ratios = []
    for bits in options.bits:
        grid = f"int{bits}-g64-asym"
        told = f"{grid}, {options.steps} steps of {options.batch}"
        extra = ("--bits", str(bits), "--steps", str(options.steps), "--batch", str(options.batch))
        theirs = both.peer("autoround", "peer_autoround.py", f"auto-round {told}", *extra)
        solver = f"autoround(steps={options.steps}, batch={options.batch})"
        ours = both.bitmill(f"{solver} : {grid} > compressed-tensors", f"bitmill autoround {told}")
        ratios.append(f"{against(f'int{bits}', ours, theirs)}.")
    both.report(
        "autoround", "AutoRound, side by side", NOTES.format(**vars(options)) + "\n\n" + "\n".join(ratios)
    )


if __name__ == "__main__":
    main()
