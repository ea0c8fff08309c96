"""Quality in the same bytes: llama.cpp's mixtures as its quantizer fills them, and as the recipe `best` does.

    python benchmarks/gguf_quality.py [--types Q4_K_M ...] [--work FOLDER] [--reuse]

llama.cpp's side is `nearest` with importance from the same calibration tokens: those bytes are llama.cpp's,
as tests/oracles show against libgguf (every type) and llama.cpp itself (every mixture). Both files are
decoded by the `gguf` package, and only the linears inside the blocks are replaced, and the blocks' norms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_llamacpp import linears
from compare import Bench, arguments, bench, machine, signature
from ruler import Ruler, write_json

TYPES = ("Q4_K_M", "Q3_K_M", "IQ4_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS")
SIDES = {
    "llama.cpp": ("nearest : {type} > gguf", ()),
    "best": ("best : {type} > gguf", ()),
    "best, default text": ("best : {type} > gguf", ("--default",)),
    "awq + best": ("awq + gptq(sweeps=4) : {type} > gguf", ()),
    "best, for the original's inputs": ("gptq(sweeps=4, asymmetric=0.25) : {type} > gguf", ()),
}
NOTES = """SmolLM2-135M off its 4-bit grid, widened so that rows are multiples of 256. `llama.cpp`: the bytes
of llama.cpp's quantizer with importance from 64 windows of 512 tokens of Python's manual; `best`: Bitmill's
recipe of that name on the same tokens, or on Bitmill's default text (half the model's own words, half
Python's). KLD in nats a token, `docs` on other topics of the manual, `other` on source code and package
pages; in parentheses the ratio to llama.cpp's."""
AFTER = """`best` calibrates on 64 windows of the manual, or, with the default text, on 128 of two kinds: a
type loses a little on the manual by it, and gains on what neither text resembles.

## What was tried

`best` is `gptq(sweeps=4)`. On Q2_K, docs and other: error feedback alone 0.307 and 0.520; four sweeps of
coordinate descent over codes, sub-block scales and super-block scales after it 0.272 and 0.493. Scales are
fitted before the feedback (llama.cpp's search, errors weighted by the mean square of the inputs) and again in
every sweep, against the whole Gram matrix.

On codebooks the choice of a vector has to be made in the metric of the loss: taken as plain distance,
feedback on an I-quant grid is worse than llama.cpp's own rounding, because eight neighbouring columns differ
in weight by a hundred.

Not tried yet: AWQ or a rotation before it, the correction for inputs that differ from the original's, learned
rounding."""


def main() -> None:
    """Run every side of every type, and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--stored", action="store_true", help="run nothing: the table of what there is")
    options = parser.parse_args()
    both = bench(options)
    wanted = [(kind, side) for kind in options.types for side in options.sides]
    if options.stored:
        rows = [stored(both, *one) for one in wanted if kept(both, *one).is_file()]
    else:
        ruler = Ruler(both.wide_model, both.work / "ruler-wide.safetensors")
        rows = [row(both, ruler, *one) for one in wanted]
    about = {**machine(), "threads": both.threads}
    write_json(both.evidence / "gguf.json", {"about": about, "rows": rows})
    text = "\n\n".join(["# The same bytes, better filled", NOTES, table(rows), AFTER, signature(about)])
    (both.evidence / "gguf.md").write_text(text + "\n", encoding="utf-8")
    print(table(rows))


def kept(both: Bench, kind: str, side: str) -> Path:
    """Where a file's scores are kept, beside it."""
    return both.work / "results" / f"{side} {kind}" / "scores.json"


def stored(both: Bench, kind: str, side: str) -> dict[str, Any]:
    """The row of a file that has been scored."""
    return {**json.loads(kept(both, kind, side).read_text(encoding="utf-8")), "type": kind, "side": side}


def row(both: Bench, ruler: Ruler, kind: str, side: str) -> dict[str, Any]:
    """One file: made, decoded, scored."""
    recipe, extra = SIDES[side]
    out, facts = both.run_bitmill(both.wide_model, recipe.format(type=kind), f"{side} {kind}", *extra)
    if not (both.reuse and kept(both, kind, side).is_file()):
        weights, bpw = linears(out / facts["file"], ruler.model.config)
        both.add(f"{side} {kind}", {**facts, "bpw": bpw}, ruler.score_linears(weights))
        write_json(kept(both, kind, side), both.rows[-1])
    return stored(both, kind, side)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a file; ratios to llama.cpp's of the same type."""
    lines = ["| | bpw | KLD docs | KLD other | ppl docs |", "|---|--:|--:|--:|--:|"]
    peers = {row["type"]: row["scores"] for row in rows if row["side"] == "llama.cpp"}
    for row in rows:
        cells = [f"{row['type']}, {row['side']}", f"{row['bpw']:.2f}"]
        for text in ("docs", "other"):
            value = row["scores"][text]["mean_kld"]
            peer = peers.get(row["type"], {}).get(text)
            ratio = f" ({value / peer['mean_kld']:.2f})" if peer and row["side"] != "llama.cpp" else ""
            cells.append(f"{value:.4f}{ratio}")
        cells.append(f"{row['scores']['docs']['perplexity']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
