"""Quality in the same bytes: llama.cpp's mixtures as its quantizer fills them, and as the recipe `best` does.

    python benchmarks/gguf_quality.py [--types Q4_K_M ...] [--work FOLDER] [--reuse]

llama.cpp's side is `nearest` with importance from the same calibration tokens: those bytes are llama.cpp's,
as tests/oracles show against libgguf (every type) and llama.cpp itself (every mixture). Both files are
decoded by the `gguf` package, and only the linears inside the blocks are replaced.
"""

from __future__ import annotations

import json
from typing import Any

from bench_llamacpp import linears
from compare import Bench, arguments, bench, machine, signature
from ruler import Ruler, write_json

TYPES = ("Q4_K_M", "Q3_K_M", "IQ4_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS")
SIDES = {
    "llama.cpp": ("nearest : {type} > gguf", ()),
    "best": ("best : {type} > gguf", ()),
    "best, default text": ("best : {type} > gguf", ("--default",)),
}
NOTES = """SmolLM2-135M off its 4-bit grid, widened so that rows are multiples of 256. `llama.cpp`: the bytes
of llama.cpp's quantizer with importance from 64 windows of 512 tokens of Python's manual; `best`: Bitmill's
recipe of that name on the same tokens, or on Bitmill's default text (half the model's own words, half
Python's). KLD in nats a token, `docs` on other topics of the manual, `other` on source code and package
pages; in parentheses the ratio to llama.cpp's."""


def main() -> None:
    """Run every side of every type, and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    options = parser.parse_args()
    both = bench(options)
    ruler = Ruler(both.wide_model, both.work / "ruler-wide.safetensors")
    rows = [row(both, ruler, kind, side) for kind in options.types for side in options.sides]
    about = {**machine(), "threads": both.threads}
    write_json(both.evidence / "gguf.json", {"about": about, "rows": rows})
    text = "\n\n".join([NOTES, table(rows), signature(about)])
    (both.evidence / "gguf_table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def row(both: Bench, ruler: Ruler, kind: str, side: str) -> dict[str, Any]:
    """One file: made, decoded, scored; its scores are kept beside it."""
    recipe, extra = SIDES[side]
    out, facts = both.run_bitmill(both.wide_model, recipe.format(type=kind), f"{side} {kind}", *extra)
    kept = out / "scores.json"
    if not (both.reuse and kept.is_file()):
        weights, bpw = linears(out / facts["file"], ruler.model.config)
        both.add(f"{side} {kind}", {**facts, "bpw": bpw}, ruler.score_linears(weights))
        write_json(kept, both.rows[-1])
    return {**json.loads(kept.read_text(encoding="utf-8")), "type": kind, "side": side}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a file; ratios to llama.cpp's of the same type."""
    lines = ["| | bpw | KLD docs | KLD other | ppl docs | seconds |", "|---|--:|--:|--:|--:|--:|"]
    peers = {row["type"]: row["scores"] for row in rows if row["side"] == "llama.cpp"}
    for row in rows:
        cells = [f"{row['type']}, {row['side']}", f"{row['bpw']:.2f}"]
        for text in ("docs", "other"):
            value = row["scores"][text]["mean_kld"]
            peer = peers.get(row["type"], {}).get(text)
            ratio = f" ({value / peer['mean_kld']:.2f})" if peer and row["side"] != "llama.cpp" else ""
            cells.append(f"{value:.4f}{ratio}")
        cells += [f"{row['scores']['docs']['perplexity']:.2f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
