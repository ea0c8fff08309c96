"""Methods beside one another on one grid: what each buys at 4, 3 and 2 bits.

python benchmarks/methods.py [--bits 4 3 2] [--only gptq ...] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import arguments, bench

METHODS = {
    "nearest": "nearest : int{bits}-g64-asym > bitmill",
    "clip": "clip : int{bits}-g64-asym > bitmill",
    "hqq": "hqq : int{bits}-g64-fz > bitmill",
    "awq": "awq + clip : int{bits}-g64-asym > bitmill",
    "gptq": "gptq : int{bits}-g64-asym > bitmill",
    "awq + gptq": "awq + gptq : int{bits}-g64-asym > bitmill",
    "hadamard + gptq": "hadamard + gptq : int{bits}-g64-asym > bitmill",
}
UNCALIBRATED = ("nearest", "hqq")
NOTES = """Every method on the off-grid test model, group 64, with the same 64 windows of 512 tokens of
Python's manual where it calibrates at all. KLD in nats against the original: `docs` is the calibration's
kind of text (other topics), `other` is library source code and package pages. Smaller is better."""


def main() -> None:
    """Run every method at every width."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    ours = bench(options)
    for bits in options.bits:
        for method in options.only:
            plain = ["--plain"] if method in UNCALIBRATED else []
            ours.bitmill(METHODS[method].format(bits=bits), f"int{bits} {method}", *plain)
    ours.report("methods", "Methods side by side", NOTES)


if __name__ == "__main__":
    main()
