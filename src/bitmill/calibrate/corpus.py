"""Texts to calibrate and to measure on: files, data sets, and what every installation of this package
carries.

Calibration on one kind of text looks better than it is on every other kind. So the defaults are mixtures, and
the halves used for calibration and for measurement have no document in common.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from bitmill.core.errors import Refused

Message = Mapping[str, str]
EVALUATION_KINDS = ("docs", "code", "reference", "legal")
_PSF = "PSF-2.0 (Python)"
_SKIPPED = {
    "pydoc_data",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}
_CODE_CHARACTERS = 1 << 20
_ROWS = 200_000  # rows of a data set looked at: far more than any calibration needs


@dataclass(frozen=True)
class Text:
    """One source of text.

    Attributes:
        kind: what sort of language it is; measurements are reported by kind.
        name: where it comes from.
        documents: its texts, in order.
        conversations: chats, each a sequence of ``{"role", "content"}``, rendered by the model's own
            template.
        licence: what its owner allows, where that is known.
        weight: its share of a mixture, relative to the others.
    """

    kind: str
    name: str
    documents: tuple[str, ...] = ()
    conversations: tuple[tuple[Message, ...], ...] = ()
    licence: str = ""
    weight: float = 1.0

    @property
    def plain(self) -> str:
        """All documents, joined by blank lines."""
        return "\n\n".join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, without name and weight."""
        content = json.dumps([self.documents, self.conversations], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def empty(self) -> bool:
        """Whether there is nothing but white space in it."""
        return not self.conversations and not any(d.strip() for d in self.documents)


def load_texts(sources: Sequence[str]) -> tuple[Text, ...]:
    """Every source, in order.

    Args:
        sources: a file (``.jsonl``, ``.parquet``, or any other as plain text), ``-`` for standard input,
            a built-in text (``docs code markdown reference legal``), or the name of a Hugging Face data set
            (``org/name[:split]``); ``=2`` behind any of them weighs it twice.

    Raises:
        Refused: a source does not exist, is not text, or is empty.
    """
    if not sources:
        raise Refused("no text was named", fix="name a file, a data set, or one of: " + ", ".join(_BUILT_IN))
    return tuple(load_text(source) for source in sources)


def load_text(source: str) -> Text:
    """One source, by the rules of :func:`load_texts`."""
    name, weight = weighed(source)
    path = Path(name).expanduser()
    if name == "-":
        text = Text("text", "standard input", (_decoded(sys.stdin.buffer.read(), "standard input"),))
    elif path.is_file():
        text = _file(path)
    elif name in _BUILT_IN:
        text = _BUILT_IN[name]()
    elif path.is_dir():
        raise Refused(f"{name!r} is a folder, not a text", fix="name the files inside it")
    elif name.count("/") == 1 and not path.suffix and not name.startswith((".", "/", "~")):
        text = _hub(name)
    else:
        raise Refused(
            f"there is no text {name!r}", fix="a file, -, a data set org/name, or: " + ", ".join(_BUILT_IN)
        )
    if text.empty:
        raise Refused("the text is empty", where=text.name, fix="name another file")
    return replace(text, weight=weight)


def weighed(source: str) -> tuple[str, float]:
    """A source's name and what it weighs: the number behind ``=``, or 1."""
    name, sign, number = source.rpartition("=")
    try:
        weight = float(number) if sign else 1.0
    except ValueError:
        return source, 1.0
    if not sign:
        return source, 1.0
    if not 0 < weight < float("inf"):
        raise Refused(
            f"a weight of {number} means nothing", where=source, fix="a positive number, such as =2"
        )
    return name, weight


def _decoded(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            f"byte {error.start} is not UTF-8", where=where, fix="convert the file to UTF-8"
        ) from error
    if "\0" in text:
        raise Refused("it holds NUL bytes: this is no text", where=where, fix="name a text file")
    return text


def _file(path: Path) -> Text:
    if path.suffix in (".jsonl", ".ndjson"):
        lines = _decoded(path.read_bytes(), str(path)).splitlines()
        rows = (
            (f"{path}:{n}", _parsed(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line.strip()
        )
        return _from_rows("text", str(path), rows)
    if path.suffix == ".parquet":
        return _from_rows("text", str(path), _parquet(path))
    kind = (
        "code" if path.suffix in (".py", ".c", ".h", ".cpp", ".rs", ".js", ".ts", ".go", ".java") else "text"
    )
    return Text(kind, str(path), (_decoded(path.read_bytes(), str(path)),))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise Refused(f"not a line of JSON: {error}", where=where, fix="one JSON object a line") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise Refused("reading parquet needs pyarrow", where=str(path), fix="pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        wanted = [c for c in ("text", "messages", "conversations") if c in file.schema_arrow.names]
        if not wanted:
            raise Refused(f"no column is called text or messages: {file.schema_arrow.names}", where=str(path))
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                yield str(path), row
    except (OSError, ValueError) as error:
        raise Refused(f"not a parquet file: {error}", where=str(path)) from error


def _hub(name: str) -> Text:
    try:
        import datasets
    except ImportError as error:
        raise Refused(
            f"there is no file {name!r}, and reading data sets by name needs the datasets package",
            fix="pip install datasets, or name a text file",
        ) from error
    dataset, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, split=split or "train", streaming=True)
        taken = ((name, row) for row, _ in zip(rows, range(_ROWS), strict=False))
        return _from_rows("text", f"hub:{name}", taken)
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(
            f"the data set {dataset!r} cannot be had: {error}", fix="check the name and the network"
        ) from error


def _from_rows(kind: str, name: str, rows: Iterable[tuple[str, Any]]) -> Text:
    """Rows with ``text``, or with ``messages`` (``role content``) or ``conversations`` (``from value``)."""
    documents: list[str] = []
    chats: list[tuple[Message, ...]] = []
    for where, row in rows:
        if isinstance(row, str):
            documents.append(row)
        elif isinstance(row, dict) and isinstance(row.get("text"), str):
            documents.append(row["text"])
        elif isinstance(row, dict) and isinstance(row.get("messages") or row.get("conversations"), list):
            chats.append(tuple(_message(m, where) for m in row.get("messages") or row["conversations"]))
        else:
            raise Refused(
                'a row holds neither "text" nor "messages"', where=where, fix='use {"text": "…"} a line'
            )
    return Text(kind if documents else "chat", name, tuple(documents), tuple(chats))


_SPEAKERS = {"human": "user", "gpt": "assistant"}


def _message(message: Any, where: str) -> Message:
    if isinstance(message, dict):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _SPEAKERS.get(role, role), "content": content}
    raise Refused('a message needs "role" and "content", both text', where=where)


def default_evaluation() -> tuple[Text, ...]:
    """The texts to measure on when none is named: several kinds, none of them in
    :func:`default_calibration`."""
    return tuple(text for text in (_BUILT_IN[kind]() for kind in EVALUATION_KINDS) if not text.empty)


def default_calibration(sampled: Text | None) -> tuple[Text, ...]:
    """The mixture to calibrate on when no text is named: half the model's own words, half what Python
    carries.

    Args:
        sampled: text sampled from the model itself, or None where that was not possible.
    """
    carried = (
        Text(
            "docs",
            "pydoc topics, even, less what the odd ones repeat",
            _unshared_topics(),
            licence=_PSF,
            weight=0.5,
        ),
        Text("code", "standard library, even", _sources(0), licence=_PSF, weight=0.3),
        replace(_markdown(), weight=0.2),
    )
    mixture = carried if sampled is None else (replace(sampled, weight=1.0), *carried)
    return tuple(text for text in mixture if not text.empty)


def _topics(parity: int) -> tuple[str, ...]:
    return tuple(topics[key] for key in sorted(topics)[parity::2])


@cache
def _unshared_topics() -> tuple[str, ...]:
    """The even topics without the paragraphs that odd ones hold too (a fifth of their text in Python 3.11).

    Topics quote each other at length (``compound`` is ``if`` and ``for`` and ``try``), so that parity alone
    would measure on what it has calibrated on.
    """
    seen = {" ".join(p.split()) for document in _topics(1) for p in document.split("\n\n")}
    kept = (
        "\n\n".join(p for p in document.split("\n\n") if " ".join(p.split()) not in seen)
        for document in _topics(0)
    )
    return tuple(document for document in kept if document.strip())


@cache
def _sources(parity: int) -> tuple[str, ...]:
    """Standard-library files whose name hashes to ``parity``, by hash, about a megabyte."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p.relative_to(root) for p in root.rglob("*.py")]
    hashed = {
        hashlib.sha256(p.as_posix().encode()).digest(): p for p in files if not _SKIPPED.intersection(p.parts)
    }
    found: list[str] = []
    size = 0
    for digest in sorted(d for d in hashed if d[-1] % 2 == parity):
        text = (root / hashed[digest]).read_text(encoding="utf-8", errors="replace")
        if len(text) > 4096:
            found.append(text)
            size += len(text)
        if size > _CODE_CHARACTERS:
            break
    return tuple(found)


@cache
def _reference() -> Text:
    """Terse reference prose: what every built-in name says about itself."""
    documents = []
    for name, thing in sorted(vars(builtins).items()):
        if name.startswith("_") or not isinstance(thing, (type, type(len))):
            continue
        entries = {name: thing}
        if isinstance(thing, type):
            entries |= {f"{name}.{k}": v for k, v in sorted(vars(thing).items()) if not k.startswith("__")}
        said = [f"{title}\n{e.__doc__}" for title, e in entries.items() if isinstance(e.__doc__, str)]
        documents.append("\n\n".join(said))
    return Text("reference", "docstrings of Python's built-ins", tuple(documents), licence=_PSF)


@cache
def _legal() -> Text:
    """Licences of Python and of the packages that this one depends on, each wording once."""
    python = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    found = [python] if python.is_file() else []
    for distribution in _dependencies():
        files = [Path(str(f.locate())) for f in distribution.files or () if "licen" in f.name.lower()]
        found += sorted(f for f in files if f.suffix in ("", ".txt", ".md") and f.is_file())
    documents: dict[str, None] = {}
    for file in found:
        documents.setdefault(file.read_text(encoding="utf-8", errors="replace").strip())
    return Text(
        "legal", "licences of installed packages", tuple(documents), licence="verbatim copies allowed"
    )


@cache
def _markdown() -> Text:
    """The front pages of the packages that this one depends on."""
    pages = (d.metadata.json.get("description") for d in _dependencies())
    documents = tuple(page for page in pages if isinstance(page, str) and len(page) > 1024)
    return Text("markdown", "descriptions of installed packages", documents, licence="as the packages")


def _dependencies() -> list[metadata.Distribution]:
    found = []
    for name in ("huggingface-hub", "numba", "numpy", "rich", "tokenizers", "torch", "transformers", "typer"):
        try:
            found.append(metadata.distribution(name))
        except metadata.PackageNotFoundError:
            continue
    return found


_BUILT_IN: Mapping[str, Callable[[], Text]] = {
    "docs": lambda: Text("docs", "pydoc topics, odd", _topics(1), licence=_PSF),
    "code": lambda: Text("code", "standard library, odd", _sources(1), licence=_PSF),
    "reference": _reference,
    "legal": _legal,
    "markdown": _markdown,
}
