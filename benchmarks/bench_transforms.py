"""AWQ and SmoothQuant against llm-compressor's: the same tokens, grids and threads.

python benchmarks/bench_transforms.py [--only awq ...] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import against, arguments, bench

W8A8 = "int8-channel-sym, input=int8-token > bitmill"
SIDES = {
    "awq int4-g64-asym": ("awq int4-g64-asym", "awq + {solver} : int4-g64-asym > bitmill"),
    "awq int3-g64-asym": ("awq int3-g64-asym", "awq + {solver} : int3-g64-asym > bitmill"),
    "smoothquant W8A8": ("smoothquant W8A8", f"smoothquant + {{solver}} : {W8A8}"),
    "smoothquant W8A8, alpha 0.5": ("smoothquant W8A8", f"smoothquant(alpha=0.5) + {{solver}} : {W8A8}"),
}
PEERS = {
    "awq int4-g64-asym": (("awq",), False),
    "awq int3-g64-asym": (("awq", "--bits", "3"), False),
    "smoothquant W8A8": (("smoothquant",), True),
}
NOTES = """The same {windows} windows of 512 tokens of Python's manual, one after the other. The peer's
`awq` is its transform before plain rounding, and so is Bitmill's. W8A8: weights by rows, inputs by tokens,
both rounded while the model is scored; the peer's alpha is 0.5 everywhere, Bitmill's is searched unless a row
says otherwise. `seconds` is the peer's `oneshot` call alone, and all of
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
    ratios, met = [], {}
    for name in options.only:
        peer, recipe = SIDES[name]
        extra, eight = PEERS[peer]
        if peer not in met:
            met[peer] = both.peer(
                "llmc", "peer_llmc.py", f"llm-compressor {peer}", *extra, eight_bit_inputs=eight
            )
        ours = both.bitmill(recipe.format(solver=options.solver), f"bitmill {name}", loaded=eight)
        ratios.append(f"{against(name, ours, met[peer])}.")
    both.report(
        "transforms",
        "AWQ and SmoothQuant, side by side",
        NOTES.format(windows=options.windows) + "\n\n" + "\n".join(ratios),
    )


if __name__ == "__main__":
    main()
