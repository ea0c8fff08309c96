"""A long document in five bullets, by 16-bit weights, by Q4_K_M, and with a cache of 3.5 bits besides.

The document is chapters of Python's own manual, as many tokens as the model's context holds beside the
question and the answer. Every side is `bitmill summarize --json` in a process of its own, so that its peak
memory is its own.

    python benchmarks/paper.py [--tokens N] [--answer 300] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from compare import Bench, arguments, bench, machine, signature
from ruler import write_json

import bitmill
from bitmill.run.document import Document
from bitmill.run.ready import Opened, opened

CHAPTERS = (
    "execmodel", "naming", "class", "function", "compound", "try", "with", "if", "for", "while", "objects",
    "types", "specialnames", "import", "exceptions", "attribute-access", "context-managers",
)  # fmt: skip
SIDES = {
    "f16, cache f16": ("f16 > gguf", "f16"),
    "Q4_K_M, cache f16": ("nearest : Q4_K_M > gguf", "f16"),
    "Q4_K_M, cache 3.5 bits": ("nearest : Q4_K_M > gguf", "turboquant-3.5"),
    "Q4_K_M, cache 3.5 bits, the latest 128 tokens as they are": (
        "nearest : Q4_K_M > gguf",
        "turboquant-3.5,window=128",
    ),
}
BULLETS = 5
QUESTION = 160  # tokens of the question and the template, at most
PENALTY = ("--repeat-penalty", "1.1")  # without it, so small a model says one sentence five times
NOTES = """A document of {tokens:,} tokens ({pages} pages of {words} words), {chosen}: chapters of Python's
manual, one after the other, cut at a paragraph. Five bullets by SmolLM2-135M-Instruct (off its 4-bit grid,
widened so that rows are multiples of 256), the likeliest words with a repetition penalty of 1.1 on the
answer's own. Seconds count from the first token read; weights are decoded to float32 to compute with, so
that of memory only the cache becomes smaller here. A model of this size summarizes badly at 16 bits, too:
what is to be seen is what changes between the rows."""
WORDS = 250  # of a printed page


def main() -> None:
    """Make the document and the files, let every side summarize, write the page."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, help="of the document; all that the context holds unless given")
    parser.add_argument("--answer", type=int, default=300, help="the most tokens of an answer")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    options = parser.parse_args()
    ours = bench(options)
    model = opened(str(ours.wide_model))
    room = model.trained - options.answer - QUESTION
    text = document(model, min(options.tokens or room, room))
    paper = ours.work / "paper.txt"
    paper.write_text(text.text, encoding="utf-8")
    rows = [side(ours, name, paper, options) for name in options.sides]
    read = rows[0]["document"]["tokens"]
    chosen = "all that its context of 8,192 holds" if options.tokens is None else "as asked for"
    count = len(text.text.split())
    notes = NOTES.format(tokens=read, pages=-(-count // WORDS), words=WORDS, chosen=chosen)
    about = {**machine(), "threads": ours.threads}
    write_json(ours.evidence / "paper.json", {"about": about, "notes": notes, "rows": rows})
    parts = ["# A long document in five bullets", notes, table(rows), *map(said, rows), signature(about)]
    (ours.evidence / "paper.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(table(rows))


def document(model: Opened, tokens: int) -> Document:
    """Whole paragraphs of the chapters, at most ``tokens`` together."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name].strip() for name in CHAPTERS if name in topics)
    ends = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(ends) > tokens:
        text = text[: ends[tokens - 1][1]].rpartition("\n\n")[0]
    return Document("paper.txt", text)


def side(ours: Bench, name: str, paper: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the file if it is not there yet, then the command."""
    recipe, kv = SIDES[name]
    folder = ours.work / "results" / "paper"
    stored = folder / f"{name}.json"
    if ours.reuse and stored.is_file():
        return json.loads(stored.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{recipe.split(' > ')[0].split()[-1]}.gguf"
    if not file.is_file():
        bitmill.quantize(str(ours.wide_model), recipe, out=str(file))
    threads = {name: str(ours.threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    words = ["summarize", str(paper), str(file), "--bullets", str(BULLETS), "--kv", kv, *PENALTY]
    load = os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, "-m", "bitmill", *words, "--max-tokens", str(options.answer), "--json"],
        env={**os.environ, **threads},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (row,) = json.loads(done.stdout)["rows"]
    row |= {"name": name, "recipe": recipe, "load_before": load, "model": file.name}
    write_json(stored, row)
    print(f"{name}: {row['seconds']['last']:.0f} s", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Memory and seconds, a line a side."""
    head = ["", "file MB", "cache MB", "predicted MB", "process at most MB", "first word s", "last word s"]
    head += ["read tokens/s", "write tokens/s", "bullets", "load before"]
    lines = [f"| {' | '.join(head)} |", "|---" + (len(head) - 1) * "|--:" + "|"]
    for row in rows:
        memory, seconds, speed = row["memory"], row["seconds"], row["tokens_per_second"]
        sizes = (
            memory["weights"]["file_bytes"],
            memory["cache"]["bytes"],
            memory["cache"]["predicted_bytes"],
            memory["process_peak_bytes"],
        )
        numbers = (seconds["first"], seconds["last"], speed["read"], speed["write"])
        cells = [row["name"], *("–" if s is None else f"{s / 1e6:.1f}" for s in sizes)]
        cells += ["–" if n is None else f"{n:.1f}" for n in numbers]
        cells += [f"{len(row['bullets'])} of {BULLETS}", f"{row['load_before']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said(row: dict[str, Any]) -> str:
    """One side's words as they came."""
    quoted = "\n".join(f"> {line}".rstrip() for line in row["text"].splitlines())
    return f"**{row['name']}** ({row['document']['said']})\n\n{quoted}"


if __name__ == "__main__":
    main()
