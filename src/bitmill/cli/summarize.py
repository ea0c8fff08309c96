"""``bitmill summarize``: a document in a few bullets, by one model or by several beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.options import Device, Json, Revision
from bitmill.cli.progress import quiet
from bitmill.cli.speaking import (
    STOPPED,
    Chunk,
    Context,
    DrawSeed,
    Dtype,
    Repeat,
    Screen,
    Temperature,
    last_lines,
    memory,
    memory_line,
    shown,
)
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.run.document import Document
    from bitmill.run.ready import Opened, Ready
    from bitmill.run.summary import Asked


Kvs = Annotated[
    list[str] | None,
    typer.Option(
        "--kv", "--kv-cache-dtype", metavar="METHOD",
        help="What keys and values are kept as: q8_0, q4_0-rot, turboquant-3.5, kivi-2, fp8 … "
        "(docs/caches.md); several with --compare. [default: what is computed in]",
        show_default=False,
    ),
]  # fmt: skip
Most = Annotated[
    int,
    typer.Option(
        "--max-tokens", "-n", "--predict", "--max-new-tokens", min=8, help="The most tokens of an answer."
    ),
]


def summarize(
    document: Annotated[
        Path,
        typer.Argument(metavar="DOC", help="A .txt, .md, .html or .pdf file.", show_default=False),
    ],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Quantized files or folders, plain model folders, hub ids or smollm2.",
            show_default=False,
        ),
    ],
    bullets: Annotated[int, typer.Option("--bullets", "-b", min=1, max=50, help="How many.")] = 5,
    kv: Kvs = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Every MODEL with every --kv, side by side.")
    ] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Read all of a long document, part by part; it is cut otherwise.")
    ] = False,
    context: Context = None,
    most: Most = 400,
    temperature: Temperature = 0.0,
    repeat: Repeat = None,
    seed: DrawSeed = 0,
    chunk: Chunk = 512,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Summarize a document in a few bullets.

    A document that is longer than the context is cut, and the output says where; with --parts all of it is
    read, each part's bullets are put together and summarized once more. Times count from the first token
    read to the answer's first and last words. With --compare one table shows them, and the memory of weights
    and cache, for every MODEL with every --kv; the texts follow.

        bitmill summarize paper.pdf q4.gguf
        bitmill summarize notes.md smollm2 --bullets 3 --parts
        bitmill summarize paper.txt f16.gguf q4.gguf --compare --json
    """
    from bitmill.run.document import read_document
    from bitmill.run.draw import Sampling
    from bitmill.run.summary import Asked

    quiet()
    if not compare and (len(models) > 1 or len(kv or []) > 1):
        raise Refused("several models or caches are named", fix="add --compare, or name one")
    text = read_document(document)
    sampling = Sampling(temperature=temperature or 0.0, repeat=1.0 if repeat is None else repeat, seed=seed)
    how = _How(
        Asked(bullets, most, parts, sampling), context, chunk, dtype, device, stream=not (compare or json)
    )
    waiting = [_opened(model, revision, kv, how) for model in models]
    found = [row for model in waiting for row in _rows(model, text, kv, how)]
    about = {"name": text.name, "kind": text.kind, "pages": text.pages, "characters": len(text.text)}
    if json:
        say.emit({"document": about, "asked_bullets": bullets, "rows": found})
    elif compare:
        _side_by_side(found, how.asked)
    else:
        _alone(found[0], how.asked)


@dataclass(frozen=True)
class _How:
    """What every row has in common."""

    asked: Asked
    context: int | None
    chunk: int
    dtype: str | None
    device: str
    stream: bool


def _opened(text: str, revision: str | None, kv: Sequence[str] | None, how: _How) -> Opened:
    """A model of which everything is known to work before any weight is read."""
    from bitmill.run.kept import kept_as, new_cache
    from bitmill.run.ready import dtype_of, opened
    from bitmill.run.speak import context_of

    model = opened(text, revision)
    context_of(model, how.context)
    kind = dtype_of(how.dtype, how.device)
    for method in kv or (None,):
        new_cache(kept_as(method, model.checkpoint)[0] or kind, model.config, kind)
    return model


def _rows(model: Opened, document: Document, kv: Sequence[str] | None, how: _How) -> list[dict[str, Any]]:
    """The document by one model, with every cache."""
    from bitmill.run.kept import kept_as
    from bitmill.run.ready import loaded

    found, ready = [], None
    wanted = [kept_as(method, model.checkpoint) for method in kv or (None,)]
    for method, held in wanted:
        if ready is None or held != wanted[len(found) - 1][1]:
            ready = loaded(model, how.dtype, how.device, held=held)
        found.append(_row(ready, document, method or ready.dtype, how))
    return found


def _row(ready: Ready, document: Document, kv: str, how: _How) -> dict[str, Any]:
    """The document by one model with one cache."""
    from bitmill.run.memory import forget_peak
    from bitmill.run.speak import Speaker
    from bitmill.run.summary import summarize as summarized

    own = forget_peak()
    speaker = Speaker(ready, kv, context=how.context, chunk=how.chunk)
    with closing(Screen()) as screen:
        hear = screen.hear if how.stream else None
        made = summarized(speaker, document, how.asked, hear=hear, tell=screen.tell)
    held = memory(ready, speaker, (made.cache_bytes, made.cache_tokens))
    return {
        "model": ready.opened.name,
        **made.to_json(),
        "load_seconds": ready.seconds,
        "memory": held if own else {**held, "process_peak_bytes": None},
    }


def _alone(row: dict[str, Any], asked: Asked) -> None:
    """What is to be known about a summary that has been streamed."""
    say.result()
    last_lines([*_remarks(row, asked.bullets), _times(row), memory_line(row["memory"])])


def _remarks(row: dict[str, Any], bullets: int) -> list[str]:
    """How the document was fitted, and what did not go as asked."""
    document = row["document"]
    lines = [document["said"]]
    lines += [
        f"it says {word!r} {count} times: to the model these are ordinary words"
        for word, count in document["control_words"].items()
    ]
    again = len(row["bullets"]) - len(set(row["bullets"]))
    if again:
        lines.append(f"{again} of the bullets say again what others say: --repeat-penalty 1.1 may help")
    if len(row["bullets"]) < bullets:
        lines.append(f"the model wrote {len(row['bullets'])} of {bullets} bullets: {STOPPED[row['stopped']]}")
    return lines


def _times(row: dict[str, Any]) -> str:
    seconds, speed = row["seconds"], row["tokens_per_second"]
    write = "" if speed["write"] is None else f", wrote {speed['write']:.1f} tokens/s"
    first = "no word came" if seconds["first"] is None else f"first word after {seconds['first']:.1f} s"
    return (
        f"loaded in {row['load_seconds']:.1f} s; {first}, last after {seconds['last']:.1f} s; "
        f"read {speed['read']:.1f} tokens/s{write}"
    )


def _side_by_side(rows: Sequence[dict[str, Any]], asked: Asked) -> None:
    """The table, then every text."""
    head = ["", "model", "cache", "file", "weights", "cache holds", "predicted", "first word", "last word",
            "bullets", "words"]  # fmt: skip
    lines = [[str(i), *_cells(row, rows[0], asked.bullets)] for i, row in enumerate(rows, 1)]
    say.result(say.table(head, lines, right=range(3, 9)))
    for i, row in enumerate(rows, 1):
        say.result(f"\n{i}  {row['model']}, cache as {row['memory']['cache']['kv']}")
        say.result(shown(row["text"]))
        last_lines(_remarks(row, asked.bullets))


def _cells(row: dict[str, Any], first: dict[str, Any], bullets: int) -> list[str]:
    weights, cache, seconds = row["memory"]["weights"], row["memory"]["cache"], row["seconds"]
    predicted = cache["predicted_bytes"]
    return [
        say.shortened(row["model"], 40),
        cache["kv"],
        say.size(weights["file_bytes"]),
        say.size(weights["bytes"]),
        say.size(cache["bytes"]),
        "–" if predicted is None else say.size(predicted),
        "–" if seconds["first"] is None else f"{seconds['first']:.1f} s",
        f"{seconds['last']:.1f} s",
        f"{len(row['bullets'])} of {bullets}",
        "as the first" if row is not first and row["text"] == first["text"] else "",
    ]
