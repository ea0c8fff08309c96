"""AWQ and SmoothQuant against llm-compressor's: the same tokens, grids and threads.

python benchmarks/bench_transforms.py [--only awq ...] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import against, arguments, bench

SIDES = {
    "awq int4-g64-asym": (("awq",), "awq + {solver} : int4-g64-asym > bitmill", False),
    "awq int3-g64-asym": (("awq", "--bits", "3"), "awq + {solver} : int3-g64-asym > bitmill", False),
    "smoothquant W8A8": (
        ("smoothquant",),
        "smoothquant + {solver} : int8-channel-sym, input=int8-token > bitmill",
        True,
    ),
}
NOTES = """The same {windows} windows of 512 tokens of Python's manual, one after the other. The peer's
`awq` is its transform before plain rounding, and so is Bitmill's. W8A8: weights by rows, inputs by tokens,
both rounded while the model is scored. `seconds` is the peer's `oneshot` call alone, and all of
`bitmill.quantize` with reading the model and writing the file; `whole` are the two processes from first line
to last. KLD in nats against the original: `docs` is the calibration's kind of text, `other` is not."""


def main() -> None:
    """Run both sides of each."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--solver", default="nearest")
    parser.add_argument("--windows", type=int, default=16, help="of calibration; the peer takes hours for 64")
    options = parser.parse_args()
    both = bench(options)
    both.take(options.windows)
    ratios = []
    for name in options.only:
        extra, recipe, eight = SIDES[name]
        peer = f"llm-compressor {name}"
        theirs = both.peer("llmc", "peer_llmc.py", peer, *extra, eight_bit_inputs=eight)
        ours = both.bitmill(recipe.format(solver=options.solver), f"bitmill {name}", loaded=eight)
        ratios.append(f"{against(name, ours, theirs)}.")
    both.report(
        "transforms",
        "AWQ and SmoothQuant, side by side",
        NOTES.format(windows=options.windows) + "\n\n" + "\n".join(ratios),
    )


if __name__ == "__main__":
    main()
