"""Speed of every GGUF block type against ``libgguf``'s C code: the same weights, the same bytes, the same
number of threads, one after the other.

    python benchmarks/bench_libgguf.py [--rows 1024] [--columns 2048] [--threads 2] [--types Q4_K ...]

``libgguf`` starts a thread a core by itself; give Bitmill as many. The two take turns, and the best of
``--rounds`` counts. Rows of the table that are not asked for stay as they were.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import libgguf
import numpy as np
import torch
from compare import EVIDENCE, machine, signature

from bitmill.core import registry
from bitmill.numerics.blocks import pack

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
I_QUANTS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs")
OTHERS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0")
BLIND = ("iq1_s", "iq2_xxs", "iq2_xs")
NOTES = """Million weights a second, quantizing and packing {rows} rows of {columns} Gaussian weights on
{threads} threads; libgguf is llama.cpp's C code, which shares rows out to as many by itself. Bytes are
equal (`IQ1_M`: the error is). The floor is a plain copy; searches are far from it, since a K-quant with
importance tries 37 fits of every 32 weights, and a codebook type up to 31 scales, at each of which it
compares all points around each group. Rows may come from several runs; both speeds of a row are from one."""


def main() -> None:
    """Time both sides and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--types", nargs="+", default=[*K_QUANTS, *I_QUANTS, *OTHERS])
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(options.rows, options.columns, generator=rng)
    importance = torch.rand(options.columns, generator=rng)
    rows = []
    for kind in (name.lower() for name in options.types):
        for told in (True, False):
            if told or kind not in BLIND:
                rows.append(compare(kind, w, importance if told else None, options))
                print(line(rows[-1]), flush=True)
    rows = merged(options.evidence / "libgguf.json", rows)
    about = {**machine(), "threads": options.threads, "floor": floor(w)}
    table = {"about": about, "rows": rows}
    options.evidence.mkdir(parents=True, exist_ok=True)
    (options.evidence / "libgguf.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    head = "| type | importance | libgguf | Bitmill | ratio | same bytes |\n|---|---|--:|--:|--:|---|"
    notes = NOTES.format(rows=options.rows, columns=options.columns, threads=options.threads)
    body = "\n".join(line(row) for row in rows)
    end = f"Floor: {about['floor']:.0f} million weights a second.\n\n{signature(about)}"
    text = f"# Speed beside libgguf\n\n{notes}\n\n{head}\n{body}\n\n{end}\n"
    (options.evidence / "libgguf.md").write_text(text, encoding="utf-8")


def compare(
    kind: str, w: torch.Tensor, importance: torch.Tensor | None, options: argparse.Namespace
) -> dict[str, object]:
    """One row: both speeds in million weights a second."""
    grid, ours, theirs = registry.parse_grid(kind), [], []
    vector = None if importance is None else importance.numpy()
    number = int(gguf.GGMLQuantizationType[kind.upper()])

    def mine() -> np.ndarray:
        q = grid.round(w, importance)
        return pack(kind, q.codes, q.params)

    def peers() -> np.ndarray:
        return libgguf.quantize_rows(w.numpy(), number, vector)

    same = bool((mine() == peers()).all())
    for _ in range(options.rounds):
        theirs.append(seconds(peers))
        ours.append(seconds(mine))
    million = w.numel() / 1e6
    return {
        "type": kind,
        "importance": importance is not None,
        "libgguf": million / min(theirs),
        "bitmill": million / min(ours),
        "ratio": min(theirs) / min(ours),
        "same": same,
    }


def merged(kept: Path, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows of an earlier table, those measured now in their places."""
    if not kept.exists():
        return rows
    fresh = {(row["type"], row["importance"]): row for row in rows}
    old = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    return [fresh.pop((row["type"], row["importance"]), row) for row in old] + list(fresh.values())


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def floor(w: torch.Tensor) -> float:
    """Million weights a second of a plain copy."""
    times = [seconds(w.clone) for _ in range(5)]
    return w.numel() / 1e6 / min(times)


def line(row: dict[str, object]) -> str:
    """One row as Markdown."""
    told, same = ("yes" if row[key] else "no" for key in ("importance", "same"))
    speeds = f"{row['libgguf']:.1f} | {row['bitmill']:.1f} | {row['ratio']:.2f}"
    return f"| {str(row['type']).upper()} | {told} | {speeds} | {same} |"


if __name__ == "__main__":
    main()
