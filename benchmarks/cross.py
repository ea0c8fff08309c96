"""Transform × solver on six grids: what each combination buys, beside the best single peer where one was run.

    python benchmarks/cross.py [--grids int4-g64-asym nvfp4 ...] [--windows 16] [--work FOLDER] [--reuse]
        [--stored]

Rows that are not asked for stay as they were. q4_k is on the wide model, whose rows are multiples of 256.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import Bench, arguments, bench, machine, signature
from ruler import Ruler, write_json

GRIDS = ("int4-g64-asym", "int3-g64-asym", "int2-g64-asym", "nvfp4", "mxfp4", "q4_k")
COMBINATIONS = (
    "nearest",
    "awq + nearest",
    "hadamard + nearest",
    "gptq",
    "awq + gptq",
    "hadamard + gptq",
    "awq + gptq(sweeps=4)",
)
WIDE = ("q4_k",)
NOTES = """SmolLM2-135M off its 4-bit grid; every combination with the same {windows} windows of 512 tokens of
Python's manual where it calibrates at all. KLD in nats against the original: `docs` is the calibration's kind
of text (other topics), `other` is library source code and package pages. q4_k is on the wide model. In bold
the least of a column; `peer` is llm-compressor's GPTQ with {peers} windows of the same text, where it was run
([GPTQ](gptq.md)), and so are rows that say so. A combination without a row was not run."""
PEERS_WINDOWS = 64


def main() -> None:
    """Run every combination on every grid, and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--only", nargs="+", choices=COMBINATIONS, default=list(COMBINATIONS))
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--stored", action="store_true", help="run nothing: the tables of what there is")
    options = parser.parse_args()
    both = bench(options)
    both.take(options.windows)
    if not options.stored:
        for grid in options.grids:
            for combination in options.only:
                run(both, grid, combination, options.windows)
    windows = sorted({options.windows, PEERS_WINDOWS})
    rows = [stored(both, *one) for one in everything(windows) if kept(both, *one).is_file()]
    about = {**machine(), "threads": both.threads}
    write_json(both.evidence / "cross.json", {"about": about, "rows": rows})
    parts = ["# Transforms and solvers", NOTES.format(windows=options.windows, peers=PEERS_WINDOWS)]
    parts += [table(both, grid, rows) for grid in GRIDS if any(row["grid"] == grid for row in rows)]
    text = "\n\n".join([*parts, signature(about)])
    (both.evidence / "cross.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def everything(windows: Sequence[int]) -> list[tuple[str, str, int]]:
    """Every grid with every combination, calibrated on each of these numbers of windows."""
    return [(grid, combination, n) for grid in GRIDS for n in windows for combination in COMBINATIONS]


def kept(both: Bench, grid: str, combination: str, windows: int) -> Path:
    """Where a combination's row is kept."""
    return both.work / "results" / called(grid, combination, windows) / "scores.json"


def called(grid: str, combination: str, windows: int) -> str:
    """A run's name; its calibration is part of it."""
    return f"cross tokens-{windows} {grid} {combination}"


def stored(both: Bench, grid: str, combination: str, windows: int) -> dict[str, Any]:
    """The row of a combination that has been run."""
    row = json.loads(kept(both, grid, combination, windows).read_text(encoding="utf-8"))
    told = f"{combination}, {windows} windows" if windows == PEERS_WINDOWS else combination
    return {**row, "grid": grid, "combination": told}


def run(both: Bench, grid: str, combination: str, windows: int) -> None:
    """Add a combination's row, unless it is there."""
    if both.reuse and kept(both, grid, combination, windows).is_file():
        return
    wide = grid in WIDE
    model = both.wide_model if wide else both.model
    ruler = Ruler(model, both.work / "ruler-wide.safetensors") if wide else both.ruler
    plain = [] if "awq" in combination or "gptq" in combination else ["--plain"]
    name = called(grid, combination, windows)
    out, facts = both.run_bitmill(model, f"{combination} : {grid} > bitmill", name, *plain)
    both.add(name, facts, ruler.score_file(out / facts["file"]))
    write_json(kept(both, grid, combination, windows), both.rows[-1])


def table(both: Bench, grid: str, rows: list[dict[str, Any]]) -> str:
    """One grid's combinations."""
    own = [row for row in rows if row["grid"] == grid]
    best = {kind: min(row["scores"][kind]["mean_kld"] for row in own) for kind in ("docs", "other")}
    lines = [
        f"## {grid}, {own[0]['bpw']:.2f} bits a weight",
        "",
        "| | KLD docs | KLD other |",
        "|---|--:|--:|",
    ]
    for row in own:
        cells = []
        for kind in ("docs", "other"):
            value = row["scores"][kind]["mean_kld"]
            cells.append(f"**{value:.4f}**" if value == best[kind] else f"{value:.4f}")
        lines.append(f"| {row['combination']} | {' | '.join(cells)} |")
    peer = peer_of(both, grid)
    if peer is not None:
        values = [peer[kind]["mean_kld"] for kind in ("docs", "other")]
        ratios = [best[kind] / value for kind, value in zip(("docs", "other"), values, strict=True)]
        lines.append(f"| peer | {values[0]:.4f} | {values[1]:.4f} |")
        lines += ["", f"The best is {ratios[0]:.2f} (docs) and {ratios[1]:.2f} (other) of the peer's."]
    return "\n".join(lines)


def peer_of(both: Bench, grid: str) -> dict[str, Any] | None:
    """Scores of llm-compressor's GPTQ on this grid."""
    table = both.evidence / "gptq.json"
    if not table.is_file():
        return None
    name = f"llm-compressor gptq {grid}"
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    return next((row["scores"] for row in rows if row["name"] == name), None)


if __name__ == "__main__":
    main()
