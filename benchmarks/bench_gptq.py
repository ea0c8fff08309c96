"""GPTQ against llm-compressor's: the same tokens, grid and threads; loss in and out of domain, and
time.

    python benchmarks/bench_gptq.py [--bits 4 3 2] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import against, arguments, bench

NOTES = """The same 64 windows of 512 tokens of Python's manual, group 64, asymmetric, one after the other.
`seconds` is the peer's `oneshot` call alone, and all of `bitmill.quantize` with reading the model and writing
the file; `whole` are the two processes from first line to last. KLD in nats against the original: `docs` is
the calibration's kind of text, `other` is not. The peer runs {batch} window(s) a batch."""


def main() -> None:
    """Run both sides at every width."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--batch", type=int, default=1, help="the peer's windows a forward pass")
    parser.add_argument("--recipe", default="gptq : int{bits}-g64-asym > compressed-tensors")
    options = parser.parse_args()
    both = bench(options)
    ratios = []
    for bits in options.bits:
        extra = ("gptq", "--bits", str(bits), "--batch", str(options.batch))
        theirs = both.peer("llmc", "peer_llmc.py", f"llm-compressor gptq int{bits}-g64-asym", *extra)
        recipe = options.recipe.format(bits=bits)
        ours = both.bitmill(recipe, f"bitmill gptq int{bits}-g64-asym")
        whole = ours["seconds_whole"] / theirs["seconds_whole"]
        ratios.append(f"{against(f'int{bits}', ours, theirs)}; the whole processes, {whole:.3f}.")
    both.report("gptq", "GPTQ, side by side", NOTES.format(batch=options.batch) + "\n\n" + "\n".join(ratios))


if __name__ == "__main__":
    main()
