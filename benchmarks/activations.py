"""Inputs rounded as well: what W8A8, W4A8 and W4A4 cost, and what SmoothQuant and a Hadamard rotation buy.

python benchmarks/activations.py [--only W8A16 ...] [--windows 16] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

from compare import Bench, arguments, bench

import bitmill
from bitmill.run.load import load_model

RECIPES = {
    "W8A16": "nearest : int8-channel-sym > bitmill",
    "W8A8, by token": "nearest : int8-channel-sym, input=int8-token > bitmill",
    "static W8A8": "nearest : int8-channel-sym, input=int8-tensor-static > bitmill",
    "SmoothQuant W8A8, by token": "smoothquant + nearest : int8-channel-sym, input=int8-token > bitmill",
    "SmoothQuant W8A8, by token, as in the paper": (
        "smoothquant(alpha=0.5, inner=false) + nearest : int8-channel-sym, input=int8-token > bitmill"
    ),
    "SmoothQuant and GPTQ W8A8, by token": (
        "smoothquant + gptq : int8-channel-sym, input=int8-token > bitmill"
    ),
    "Hadamard W8A8, by token": "hadamard(r4=true) + nearest : int8-channel-sym, input=int8-token > bitmill",
    "SmoothQuant static W8A8": "smoothquant + nearest : int8-channel-sym, input=int8-tensor-static > bitmill",
    "LLM.int8()": "nearest : llm-int8, input=llm-int8 > bitmill",
    "W8A16, GPTQ": "gptq : int8-channel-sym > bitmill",
    "W4A16": "gptq : int4-channel-sym > bitmill",
    "W4A4": "gptq : int4-channel-sym, input=int4-token > bitmill",
    "Hadamard W4A4": "hadamard(r4=true) + gptq : int4-channel-sym, input=int4-token > bitmill",
}
NOTES = """SmolLM2-135M off its 4-bit grid; {windows} windows of 512 tokens of Python's manual where anything
is calibrated. Inputs of all linears of the blocks are rounded while the model is scored, as its runtime
would; a token's scale is taken as it comes, a static one from calibration. KLD in nats against the original:
`docs` is the calibration's kind of text, `other` is library source code and package pages."""


def scored(ours: Bench, recipe: str, name: str) -> None:
    """One recipe's row, of the model as it runs."""
    plain = ["--plain"] if "gptq" not in recipe and "smooth" not in recipe and "static" not in recipe else []
    out, facts = ours.run_bitmill(ours.model, recipe, name, *plain)
    model = load_model(bitmill.open_source(str(out / facts["file"])))
    ours.add(name, facts, ours.ruler.score(model))


def main() -> None:
    """Run every recipe."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    options = parser.parse_args()
    ours = bench(options)
    ours.take(options.windows)
    for name in options.only:
        scored(ours, RECIPES[name], name)
    ours.report("activations", "Inputs rounded as well", NOTES.format(windows=options.windows))


if __name__ == "__main__":
    main()
