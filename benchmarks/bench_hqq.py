"""HQQ against the hqq package: group 64, real-valued zero points, no calibration.

python benchmarks/bench_hqq.py [--bits 4 3] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import arguments, bench

NOTES = """The hqq package's own optimizer (group 64 along the inputs, scale and zero point in half precision)
and Bitmill's, both without calibration. KLD in nats against the original on two kinds of text."""


def main() -> None:
    """Run both sides at every width."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--recipe", default="hqq : int{bits}-g64-fz")
    options = parser.parse_args()
    both = bench(options)
    for bits in options.bits:
        both.peer("hqq", "peer_hqq.py", f"hqq int{bits}-g64", "--bits", str(bits))
        both.bitmill(options.recipe.format(bits=bits), f"bitmill hqq int{bits}-g64-fz", "--plain")
    both.report("hqq", "HQQ, side by side", NOTES)


if __name__ == "__main__":
    main()
