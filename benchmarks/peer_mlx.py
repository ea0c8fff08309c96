"""MLX's affine quantization on every block linear, in an environment of its own; no calibration.

peers/mlx/bin/python benchmarks/peer_mlx.py MODEL TOKENS OUT --bits 4
"""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np
import peer
import torch


def main() -> None:
    """Quantize and store."""
    parser = peer.arguments(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    options = parser.parse_args()
    linears = peer.block_linears(peer.opened(options))
    weights = {name: mx.array(linear.weight.detach().numpy()) for name, linear in linears.items()}
    settings = {"group_size": options.group, "bits": options.bits}
    mx.eval(*weights.values())
    before = time.monotonic()
    packed = {name: mx.quantize(weight, **settings) for name, weight in weights.items()}
    mx.eval(*(part for parts in packed.values() for part in parts))
    seconds = time.monotonic() - before
    dense = {name: np.array(mx.dequantize(*parts, **settings)) for name, parts in packed.items()}
    peer.keep(
        options,
        {f"{name}.weight": torch.from_numpy(values) for name, values in dense.items()},
        ("mlx", "transformers"),
        peer="mlx",
        grid=f"int{options.bits}-g{options.group}-bias-sf32",
        bpw=options.bits + 2 * 32 / options.group,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
