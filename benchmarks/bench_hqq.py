"""HQQ against the hqq package: group 64, real-valued zero points, no calibration.

python benchmarks/bench_hqq.py [--bits 4 3] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import against, arguments, bench

NOTES = """The hqq package's own optimizer (group 64 along the inputs, scale and zero point in half
precision) and Bitmill's, both without calibration. `seconds` is the package's quantizing alone, and all
of `bitmill.quantize` with reading the model and writing the folder. KLD in nats against the original on
two kinds of text."""


def main() -> None:
    """Run both sides at every width."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--recipe", default="hqq : int{bits}-g64-fz")
    options = parser.parse_args()
    both = bench(options)
    ratios = []
    for bits in options.bits:
        theirs = both.peer("hqq", "peer_hqq.py", f"hqq int{bits}-g64", "--bits", str(bits))
        ours = both.bitmill(options.recipe.format(bits=bits), f"bitmill hqq int{bits}-g64-fz", "--plain")
        ratios.append(f"{against(f'int{bits}', ours, theirs)}.")
    both.report("hqq", "HQQ, side by side", NOTES + "\n\n" + "\n".join(ratios))


if __name__ == "__main__":
    main()
