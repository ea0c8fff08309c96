"""bitsandbytes' NF4 on every block linear, its maxima quantized again; in an environment of its own.

peers/hqq/bin/python benchmarks/peer_nf4.py MODEL TOKENS OUT
"""

from __future__ import annotations

import time

import peer
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

BLOCK, SUPER = 64, 256  # weights an absolute maximum, maxima a scale of theirs


def main() -> None:
    """Quantize and store."""
    options = peer.arguments(__doc__).parse_args()
    linears = peer.block_linears(peer.opened(options))
    before = time.monotonic()
    packed = {
        name: quantize_4bit(linear.weight.data, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        for name, linear in linears.items()
    }
    seconds = time.monotonic() - before
    peer.keep(
        options,
        {f"{name}.weight": dequantize_4bit(*both) for name, both in packed.items()},
        ("bitsandbytes", "transformers"),
        peer="bitsandbytes",
        grid=f"nf4-b{BLOCK}-dq",
        bpw=4 + 8 / BLOCK + 32 / (BLOCK * SUPER),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
