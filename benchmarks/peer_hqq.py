"""The hqq package on every block linear, in an environment of its own; no calibration.

peers/hqq/bin/python benchmarks/peer_hqq.py MODEL TOKENS OUT --bits 4
"""

from __future__ import annotations

import time

import peer
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

COSTS = 2 * 16  # bits a group: scale and zero point, stored in half precision


def main() -> None:
    """Quantize and store."""
    parser = peer.arguments(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    options = parser.parse_args()
    linears = peer.block_linears(peer.opened(options))
    wanted = BaseQuantizeConfig(nbits=options.bits, group_size=options.group, axis=1)
    before = time.monotonic()
    packed = {
        name: HQQLinear(linear, wanted, compute_dtype=torch.float32, device="cpu", del_orig=False)
        for name, linear in linears.items()
    }
    peer.keep(
        options,
        {f"{name}.weight": layer.dequantize() for name, layer in packed.items()},
        ("hqq", "transformers"),
        peer="hqq",
        grid=f"int{options.bits}-g{options.group}-fz",
        bpw=options.bits + COSTS / options.group,
        seconds=time.monotonic() - before,
    )


if __name__ == "__main__":
    main()
