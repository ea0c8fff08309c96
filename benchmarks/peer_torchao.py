"""torchao's integer weights on every block linear, in an environment of its own; no calibration.

peers/torchao/bin/python benchmarks/peer_torchao.py MODEL TOKENS OUT --bits 4
"""

from __future__ import annotations

import time

import peer
import torch
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType


def main() -> None:
    """Quantize and store."""
    parser = peer.arguments(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    options = parser.parse_args()
    model = peer.opened(options)
    names = set(peer.block_linears(model))
    wanted = IntxWeightOnlyConfig(
        getattr(torch, f"int{options.bits}"),
        PerGroup(options.group),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float32,
    )
    before = time.monotonic()
    quantize_(model, wanted, filter_fn=lambda _, name: name in names)
    seconds = time.monotonic() - before
    linears = peer.block_linears(model)
    peer.keep(
        options,
        {f"{name}.weight": linear.weight.dequantize() for name, linear in linears.items()},
        ("torchao", "transformers"),
        peer="torchao",
        grid=f"int{options.bits}-g{options.group}-asym-sf32",
        bpw=options.bits + (32 + 8) / options.group,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
