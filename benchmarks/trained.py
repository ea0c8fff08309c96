"""Weights that are trained: EfficientQAT's first stage with either derivative of rounding beside plain
rounding, GPTQ and AutoRound, and LLM-QAT with inputs and cache rounded beside the first two.

python benchmarks/trained.py [--grids int2 ...] [--steps 400] [--whole-steps 100] [--only blocks|whole]
    [--tune-steps 30] [--batch 4] [--windows 64] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import arguments, bench

GRIDS = {"int2": "int2-g64-asym", "int3": "int3-g64-asym", "int4": "int4-g64-asym"}
INPUTS = "int4-channel-sym, input=int8-token, cache=int4-token-asym > bitmill"
AMPLITUDE = 0.21
NOTES = """The off-grid test model. Rows of a grid have the same {windows} windows of 512 tokens of Python's
manual; `efficientqat` and `autoround` take {steps} steps of {batch} windows a block, and `wave` is
EfficientQAT with StableQAT's derivative of rounding (amplitude 0.21) in place of the identity; `+ tune` is
its second stage, {tune_steps} steps of one window. The rows `4-8-4` have weights of 4 bits by channel,
inputs of 8 and keys and values of 4, measured with inputs and cache rounded; `llmqat` learns from what the
model itself writes. KLD in nats against the original: `docs` is the calibration's kind of text (other
topics), `other` is library source code and package pages. Smaller is better."""


def main() -> None:
    """Blocks, then the whole model."""
    parser = arguments(__doc__)
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=["int2", "int3"])
    parser.add_argument("--steps", type=int, default=400, help="of EfficientQAT, a block")
    parser.add_argument("--batch", type=int, default=4, help="of EfficientQAT, windows a step")
    parser.add_argument("--tune-steps", type=int, default=0, help="of its second stage; 0: without it")
    parser.add_argument("--whole-steps", type=int, default=100, help="of LLM-QAT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of EfficientQAT")
    parser.add_argument("--without", nargs="+", choices=["wave", "autoround"], default=[], help="rows")
    parser.add_argument("--stored", action="store_true", help="blocks: with --reuse, the rows there are")
    parser.add_argument("--only", choices=["blocks", "whole"], help="a half of the table")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    options = parser.parse_args()
    ours = bench(options)
    ours.take(options.windows)
    for name in options.grids if options.only != "whole" else []:
        course = f"steps={options.steps}, batch={options.batch}"
        solvers = {"nearest": "nearest", "gptq": "gptq"}
        for seed in options.seeds:
            told = f"{course}, seed={seed}"
            solvers[f"efficientqat {seed}"] = f"efficientqat({told})"
            if options.tune_steps:
                scales = f"tune(steps={options.tune_steps}, batch=1)"
                solvers[f"efficientqat {seed} + tune"] = f"efficientqat({told}) + {scales}"
            if "wave" not in options.without:
                solvers[f"efficientqat {seed} wave"] = f"efficientqat({told}, amplitude={AMPLITUDE})"
        if "autoround" not in options.without:
            solvers["autoround"] = f"autoround({course})"
        for called, solver in solvers.items():
            if options.stored and not ours.has(f"{name} {called}"):
                continue
            ours.bitmill(f"{solver} : {GRIDS[name]} > bitmill", f"{name} {called}")
    if options.only != "blocks":
        ours.bitmill(f"nearest : {INPUTS}", "4-8-4 nearest", loaded=True)
        ours.bitmill(f"gptq : {INPUTS}", "4-8-4 gptq", loaded=True)
        trained = f"llmqat(steps={options.whole_steps})"
        ours.bitmill(f"{trained} : {INPUTS}", "4-8-4 llmqat", "--default", loaded=True)
    ours.report("trained", "Weights that are trained", NOTES.format(**vars(options)))


if __name__ == "__main__":
    main()
