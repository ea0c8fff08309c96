"""W4A4KV4: what rounding to nearest loses, and what Hadamard rotations, GPTQ and learned rotations give back.

Each row is measured as its runtime would compute it: inputs of all linears of the blocks, keys and values
rounded to 4 bits. Intervals are of a bootstrap over windows; the second is that of the difference from the
row above, on the same windows. ``--table w4a8kv4`` is QoQ instead, step by step, beside W4A16 and W8A8 with
the same calibration.

    python benchmarks/rotations.py [--table w4a8kv4] [--windows 64] [--steps 100] [--count 12]
        [--only RTN ...] [--work FOLDER]
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import Bench, arguments, bench, machine, signature
from ruler import WINDOW, calibration_windows, digest, documents, other_documents, write_json

import bitmill
from bitmill.calibrate.corpus import Text
from bitmill.measurement.measure import Protocol
from bitmill.measurement.record import Record

ROUNDING = "int4-channel-sym, input=int4-token, cache=int4-token-asym > bitmill"
CLIPPED = "int4-channel-sym, input=int4-token-clip0.9, cache=int4-token-asym-clip0.95 > bitmill"
RUNTIME = "r3=true, r4=true"
RECIPES = {
    "RTN": f"nearest : {ROUNDING}",
    "Hadamard, in the weights alone": f"hadamard + nearest : {ROUNDING}",
    "Hadamard": f"hadamard({RUNTIME}) + nearest : {ROUNDING}",
    "Hadamard + GPTQ": f"hadamard({RUNTIME}) + gptq : {ROUNDING}",
    "Hadamard + GPTQ, clipped (QuaRot)": f"hadamard({RUNTIME}) + gptq : {CLIPPED}",
    "learned + GPTQ (SpinQuant)": f"spinquant({RUNTIME}, steps={{steps}}) + gptq : {ROUNDING}",
    "learned on the text + GPTQ": f"spinquant({RUNTIME}, steps={{steps}}, loss=text) + gptq : {ROUNDING}",
    "learned, in the weights alone": f"spinquant(steps={{steps}}) + gptq : {ROUNDING}",
    "learned in blocks of 64": f"spinquant({RUNTIME}, steps={{steps}}, block=64) + gptq : {ROUNDING}",
}
TABLE = tuple(name for name in RECIPES if name.startswith(("RTN", "Hadamard", "learned + ")))
NOTES = """SmolLM2-135M off its 4-bit grid. Weights by rows, inputs of all linears of the blocks by tokens,
keys and values by tokens and heads, all in 4 bits; {windows} windows of 512 tokens of Python's
manual where anything is calibrated, {steps} steps of one window where rotations are learned. KLD in
nats against the original: `docs` is the calibration's kind of text, `other` is library source code
and package pages; {count} windows of each, the second half scored. In brackets, 95 % intervals over
windows; *change* is from the row above, on the same windows."""
INT8 = "input=int8-token, cache=int4-token-asym > bitmill"
SMOOTH = "smoothattention + smoothquant(alpha=0.3, inner=true, norms=false)"
W4A8 = {
    "W4A16": "gptq : int4-g64-asym > bitmill",
    "W8A8": "smoothquant + gptq : int8-channel-sym, input=int8-token > bitmill",
    "W4A8KV4, rounded": f"nearest : int4-g64-qoq, {INT8}",
    "rotated": f"hadamard + nearest : int4-g64-qoq, {INT8}",
    "rotated, GPTQ": f"hadamard + gptq : int4-g64-qoq, {INT8}",
    "and smoothed": f"hadamard + {SMOOTH} + gptq : int4-g64-qoq, {INT8}",
    "and in order (QoQ)": f"hadamard + {SMOOTH} + reorder + gptq : int4-g64-qoq, {INT8}",
}
W4A8_NOTES = """SmolLM2-135M off its 4-bit grid. QoQ's W4A8KV4, a step a row: 4-bit weights inside 8-bit
ones in groups of 64 (rows of 576 have no groups of 128), inputs in 8 bits by tokens, keys and values in 4 by
tokens and heads; above it W4A16 in the same groups and W8A8, whose caches are not rounded; {windows} windows
of 512 tokens of Python's manual where anything is calibrated, the same for all. KLD in nats against the
original: `docs` is the calibration's kind of text, `other` is library source code and package pages; {count}
windows of each, the second half scored. In brackets, 95 % intervals over windows; *change* is from the row
above, on the same windows."""
TABLES = {
    "w4a4kv4": ("rotations", "W4A4KV4, step by step", RECIPES, TABLE, NOTES),
    "w4a8kv4": ("qoq", "W4A8KV4 beside W4A16 and W8A8", W4A8, tuple(W4A8), W4A8_NOTES),
}
"""Of each table: its file, title and rows, those that are made unless others are asked for, and notes."""
DRAWS = 4000
LICENCE = 2000  # characters of a window of source code: its head says little


def made(ours: Bench, name: str, recipe: str, windows: int) -> tuple[Path, dict[str, Any]]:
    """The model by a recipe, and what it took."""
    out = ours.work / "rotations" / f"{digest(torch.tensor(list(recipe.encode())))}-{windows}"
    facts = out / "facts.json"
    if ours.reuse and facts.is_file():
        return out / "model", json.loads(facts.read_text(encoding="utf-8"))
    began = time.monotonic()
    calib = calibration_windows(ours.model)[:windows]
    report = bitmill.quantize(
        str(ours.model), recipe, out / "model", calib=calib, nsamples=windows, seqlen=WINDOW, force=True
    )
    linears = [row for row in report.plan["rows"] if row["solved"]]
    notes = [note.text for note in report.notes if note.kind == "rotations"]
    found = {
        "name": name,
        "recipe": recipe,
        "bpw": report.plan["bpw_linears"],
        "linears": len(linears),
        "seconds": time.monotonic() - began,
        "rotations": notes,
    }
    write_json(facts, found)
    return out / "model", found


def by_window(record: Record, kind: str) -> np.ndarray[Any, Any]:
    """Mean KLD of each window of one kind."""
    positions, kinds = record.positions, record.kind_of_window
    chosen = [w for w, k in enumerate(kinds) if k == kind]
    return np.array([positions.kld[positions.window == w].mean() for w in chosen])


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """95 % of the means of resampled windows."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (DRAWS, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def scores(record: Record, above: Record | None) -> dict[str, Any]:
    """What one model lost on each kind of text, and against the row above."""
    found = {}
    for kind, summary in record.kinds.items():
        here = by_window(record, kind)
        found[kind] = {
            "mean_kld": summary.kld.mean,
            "interval": interval(here),
            "same_top": summary.same_top,
            "perplexity": summary.ppl,
        }
        if above is not None:
            change = here - by_window(above, kind)
            found[kind] |= {"change": float(change.mean()), "change_interval": interval(change)}
    return found


def row_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["name"]]
    for kind in ("docs", "other"):
        score = row["scores"][kind]
        low, high = score["interval"]
        cells.append(f"{score['mean_kld']:.4f} [{low:.3f}, {high:.3f}]")
        change = score.get("change")
        more = score.get("change_interval", (0.0, 0.0))
        cells.append("" if change is None else f"{change:+.4f} [{more[0]:+.3f}, {more[1]:+.3f}]")
    docs = row["scores"]["docs"]
    cells += [f"{docs['perplexity']:.2f}", f"{docs['same_top']:.3f}", f"{row['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Make and measure every recipe."""
    parser = arguments(__doc__)
    parser.add_argument("--table", choices=list(TABLES), default="w4a4kv4")
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, *W4A8])
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--steps", type=int, default=100, help="of learning rotations")
    parser.add_argument("--count", type=int, default=12, help="windows of each kind of text that is scored")
    options = parser.parse_args()
    file, title, recipes, usual, said = TABLES[options.table]
    chosen = options.only or usual
    unknown = [name for name in chosen if name not in recipes]
    if unknown:
        parser.error(f"{unknown[0]!r} is no row of {options.table}")
    ours = bench(options)
    torch.set_num_threads(options.threads)
    pages = other_documents()
    pages = pages[:: max(1, len(pages) // options.count)][: options.count]  # a window of each
    texts = [
        Text("docs", "pydoc topics, odd", (documents()["docs"],)),
        *(Text("other", f"source {i}", (t[LICENCE * at :],)) for i, (t, at) in enumerate(pages)),
    ]
    rows: list[dict[str, Any]] = []
    above: Record | None = None
    for name in chosen:
        out, facts = made(ours, name, recipes[name].format(steps=options.steps), options.windows)
        how = Protocol(window=WINDOW, count=options.count, floor=False)
        record = bitmill.measure(str(out), str(ours.model), texts=texts, protocol=how)
        rows.append({**facts, "name": name, "scores": scores(record, above)})
        above = record
        print(row_of(rows[-1]), flush=True)
    about = {**machine(), "threads": options.threads, "windows": options.windows, "steps": options.steps}
    write_json(ours.evidence / f"{file}.json", {"about": about, "rows": rows})
    head = (
        "| | KLD docs | change | KLD other | change | ppl docs | same top | seconds |\n|---"
        + 7 * "|--:"
        + "|"
    )
    notes = said.format(windows=options.windows, steps=options.steps, count=options.count)
    learned = [f"- *{row['name']}*: {note}" for row in rows for note in row["rotations"]]
    body = "\n".join([head, *map(row_of, rows)]) + "".join(f"\n\n{line}" for line in learned)
    path = ours.evidence / f"{file}.md"
    path.write_text(f"# {title}\n\n{notes}\n\n{body}\n\n{signature(about)}\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
