"""Intel's auto-round on given calibration tokens; runs in an environment of its own.

What is kept is every block linear as its codes say. The peer's own defaults hold wherever the work does not
fix a value: its learning rates, learned ranges, the precision that it tunes in. ``seconds`` is its
``quantize`` call alone.

    peers/autoround/bin/python benchmarks/peer_autoround.py MODEL TOKENS.safetensors OUT --bits 4 --steps 200
"""

from __future__ import annotations

import time

import peer
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoTokenizer

PACKAGES = ("auto-round", "transformers")


def main() -> None:
    """Quantize and store."""
    parser = peer.arguments(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    options = parser.parse_args()
    model = peer.opened(options)
    ids = load_file(options.tokens)["input_ids"]
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group,
        sym=False,
        iters=options.steps,
        dataset=list(ids.split(options.batch)),
        nsamples=ids.shape[0],
        seqlen=ids.shape[1],
        batch_size=options.batch,
        device_map="cpu",
    )
    before = time.monotonic()
    rounded, _ = tuner.quantize()
    seconds = time.monotonic() - before
    peer.keep(
        options,
        {f"{name}.weight": linear.weight.data for name, linear in peer.block_linears(rounded).items()},
        PACKAGES,
        peer="auto-round",
        grid=f"int{options.bits}-g{options.group}-asym",
        bpw=options.bits + (16 + options.bits) / options.group,
        windows=list(ids.shape),
        batch=options.batch,
        steps=options.steps,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
