"""Distilled scales after GPTQ: what the step buys at 4, 3 and 2 bits and on K-quants, and its seconds.

python benchmarks/tune.py [--grids int4 q3_k ...] [--steps 100] [--rate 1e-3] [--trained]
    [--trained-steps 400] [--batch 4] [--windows 64] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import arguments, bench
from ruler import Ruler

GRIDS = {
    "int4": "int4-g64-asym > bitmill",
    "int3": "int3-g64-asym > bitmill",
    "int2": "int2-g64-asym > bitmill",
    "q4_k": "q4_k > gguf",
    "q3_k": "q3_k > gguf",
    "q2_k": "q2_k > gguf",
}
WIDE = ("q4_k", "q3_k", "q2_k")
NOTES = """The off-grid test model, with the same {windows} windows of 512 tokens of Python's manual for both
rows of a grid; {steps} steps of {batch} windows. K-quants are on the model with rows of 768. What judges the
steps is library source code of other files than the ruler's. KLD in nats against the original: `docs` is the
calibration's kind of text (other topics), `other` is library source code and package pages. Smaller is
better. Seconds of the second row are those of both."""


def main() -> None:
    """Every grid without and with the step; EfficientQAT's two stages at 2 bits."""
    parser = arguments(__doc__)
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows a step of distilling")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--trained", action="store_true", help="efficientqat as well: hours")
    parser.add_argument("--trained-steps", type=int, default=400, help="of that, a block")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    options = parser.parse_args()
    ours = bench(options)
    ours.take(options.windows)
    wide = Ruler(ours.wide_model, ours.work / "ruler-wide.safetensors")
    step = f"tune(steps={options.steps}, batch={options.batch}, rate={options.rate})"
    for name in options.grids:
        solvers = ["gptq", f"gptq + {step}"]
        if options.trained and name not in WIDE:
            trained = f"efficientqat(steps={options.trained_steps})"
            solvers += [trained, f"{trained} + {step}"]
        for solver in solvers:
            label = f"{name} {solver.replace(step, 'tune')}"
            if name not in WIDE:
                ours.bitmill(f"{solver} : {GRIDS[name]}", label)
                continue
            out, facts = ours.run_bitmill(ours.wide_model, f"{solver} : {GRIDS[name]}", label)
            ours.add(label, facts, wide.score_file(out / facts["file"]))
    ours.report("tune", "Distilled scales", NOTES.format(**vars(options)))


if __name__ == "__main__":
    main()
