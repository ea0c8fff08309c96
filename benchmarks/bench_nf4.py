"""NF4 against bitsandbytes: blocks of 64, maxima quantized to 8 bits, no calibration.

python benchmarks/bench_nf4.py [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import arguments, bench

NOTES = """bitsandbytes' `quantize_4bit` (NF4, blocks of 64, double quantized) and Bitmill's file of the same
layout, both without calibration. KLD in nats against the original on two kinds of text. Without double
quantization the bytes are the same; with it the stored scales are, and Bitmill rounds the weights against
those, where bitsandbytes rounds them against the scales as they were: one code in a hundred differs."""


def main() -> None:
    """Run both sides."""
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="nearest : nf4-b64-dq > bitmill")
    options = parser.parse_args()
    both = bench(options)
    both.peer("hqq", "peer_nf4.py", "bitsandbytes nf4-b64-dq")
    both.bitmill(options.recipe, "bitmill nf4-b64-dq", "--plain")
    both.report("nf4", "NF4, side by side", NOTES)


if __name__ == "__main__":
    main()
