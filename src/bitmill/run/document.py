"""The text of a document: plain text, Markdown, HTML without its marks, PDF through pypdf."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from bitmill.core.errors import BadFile, Refused

PDF_PIP = 'pip install "bitmill[pdf]"'
_MOST_BYTES = 64 << 20
_MOST_CHARACTERS = 64 << 20
_SILENT = frozenset({"script", "style", "noscript", "template", "svg"})
_BLOCKS = frozenset(
    {
        "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "figcaption", "figure",
        "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p",
        "pre", "section", "table", "td", "th", "title", "tr", "ul",
    }
)  # fmt: skip
_PAGE = re.compile(r"\s*<(!doctype html|html)\b", re.IGNORECASE)
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})
_OTHERS = {
    ".docx": "a Word document", ".doc": "a Word document", ".odt": "an OpenDocument text", ".rtf": "RTF",
    ".epub": "a book in EPUB", ".djvu": "DjVu", ".ps": "PostScript",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text and where it comes from.

    Attributes:
        name: the file's name.
        kind: ``text``, ``html`` or ``pdf``.
        pages: of a PDF.
    """

    name: str
    text: str
    kind: str = "text"
    pages: int | None = None


def read_document(path: Path) -> Document:
    """The text of a file.

    Raises:
        Refused: there is no such file, it is of a kind that is not read, empty, or needs a package.
        BadFile: it is not what it claims to be.
    """
    data = _bytes(path)
    if b"%PDF-" in data[:1024]:
        return _checked(_pdf(path, data), path)
    if path.suffix.lower() == ".pdf":
        raise BadFile("the file is no PDF: it does not begin with %PDF-", where=str(path))
    if path.suffix.lower() in _OTHERS:
        raise Refused(
            f"{path.name} is {_OTHERS[path.suffix.lower()]}, which is not read here",
            fix="save it as .txt, .md, .html or .pdf",
        )
    text = _decoded(path, data)
    if path.suffix.lower() in (".html", ".htm", ".xhtml") or _PAGE.match(text):
        return _checked(Document(path.name, _without_marks(text), "html"), path)
    return _checked(Document(path.name, text.strip()), path)


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise Refused(f"the document {str(path)!r} {what}", fix="name a .txt, .md, .html or .pdf file")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise Refused(
            f"the document has {size / 1e6:.0f} MB, and {_MOST_BYTES / 1e6:.0f} are read", where=str(path),
            fix="split it",
        )  # fmt: skip
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read the document: {error.strerror}", where=str(path)) from error


def _decoded(path: Path, data: bytes) -> str:
    kind = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if kind == "utf-8-sig" and b"\0" in data:
        raise Refused(f"{path.name} is no text: it holds zero bytes", where=str(path))
    try:
        return data.decode(kind).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{path.name} is not UTF-8 text: byte {error.start:,} does not fit",
            where=str(path),
            fix=f"iconv -f latin1 -t utf-8 {path.name} > new.txt, where it is Latin-1",
        ) from error


def _checked(document: Document, path: Path) -> Document:
    if not document.text.strip():
        pages = "" if document.pages is None else f" on its {document.pages} pages"
        fix = "pages that are pictures need a program that reads them (OCR) first" if pages else None
        raise Refused(f"there is no text{pages}", where=str(path), fix=fix)
    return document


class _Text(HTMLParser):
    """The words of a page, blocks on lines of their own."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._silent = ""
        self._depth = 0
        self._kept = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._silent:
            self._depth += tag == self._silent
        elif tag in _SILENT:
            self._silent, self._depth = tag, 1
        elif tag in _BLOCKS:
            self._parts.append("\n- " if tag == "li" else "\n")
        self._kept += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._silent:
            self._depth -= tag == self._silent
            self._silent = self._silent if self._depth else ""
        elif tag in _BLOCKS and tag not in _VOID:
            self._parts.append("\n")
        self._kept = max(self._kept - (tag == "pre"), 0)

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._parts.append(data if self._kept else re.sub(r"\s+", " ", data))

    def whole(self) -> str:
        lines = [line.rstrip() for line in "".join(self._parts).split("\n")]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _without_marks(text: str) -> str:
    page = _Text()
    page.feed(text)
    page.close()
    return page.whole()


def _pdf(path: Path, data: bytes) -> Document:
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        what = "PDF files are read with pypdf, which is not installed"
        raise Refused(what, where=str(path), fix=PDF_PIP) from error
    faults = (PyPdfError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Refused("the PDF asks for a password", where=str(path), fix="save it without one")
        pages = [page.extract_text() for page in reader.pages]
    except DependencyError as error:
        raise Refused(
            f"the PDF cannot be read: {error}", where=str(path), fix="pip install cryptography"
        ) from error
    except faults as error:
        raise BadFile(f"the PDF is damaged: {error}", where=str(path)) from error
    text = "\n\n".join(page.strip() for page in pages)
    if len(text) > _MOST_CHARACTERS:
        what = f"the PDF holds {len(text):,} characters; {_MOST_CHARACTERS:,} are read"
        raise Refused(what, where=str(path), fix="split it")
    return Document(path.name, text, "pdf", len(pages))
