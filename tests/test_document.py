"""Documents as text: plain, Markdown, HTML without its marks, and PDF files that are written here by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bitmill.core.errors import BadFile, Refused
from bitmill.run.document import read_document


def pdf(*pages: str, extra: bytes = b"") -> bytes:
    """A PDF of one font, a line of text a page."""
    count = len(pages)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>"
        % (b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(count)), count),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        drawn = b"BT /F1 12 Tf 72 720 Td (%s) Tj ET" % text.encode("latin-1")
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * i),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn),
        ]
    made, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size, start = len(objects) + 1, len(made)
    made += b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    return made + b"trailer\n<< /Size %d /Root 1 0 R %s>>\nstartxref\n%d\n%%%%EOF\n" % (size, extra, start)


def written(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_plain_text_and_markdown(tmp_path: Path) -> None:
    found = read_document(written(tmp_path, "a.md", "# Mills\r\n\r\nThe wheel turns.\r\n"))
    assert (found.name, found.kind, found.text) == ("a.md", "text", "# Mills\n\nThe wheel turns.")
    assert read_document(written(tmp_path, "b.txt", b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe")).text == "grüße"
    assert read_document(written(tmp_path, "c.txt", "Müller".encode("utf-16"))).text == "Müller"


PAGE = """<!DOCTYPE html><html><head><title>Mills</title><style>p { color: red }</style>
<script>if (1 < 2) { alert("no") }</script></head><body><h1>The   wheel</h1>
<p>It turns &amp; turns,<br>slowly.</p><ul><li>stone</li><li>water</li></ul><pre>a  b
c</pre><svg><title>picture</title></svg></body></html>"""


@pytest.mark.parametrize("name", ["a.html", "a.txt"])
def test_html_without_its_marks(tmp_path: Path, name: str) -> None:
    found = read_document(written(tmp_path, name, PAGE))
    assert found.kind == "html" and found.text.startswith("Mills\n")
    lines = [line.strip() for line in found.text.splitlines() if line.strip()]
    assert lines == [
        "Mills", "The wheel", "It turns & turns,", "slowly.", "- stone", "- water", "a  b", "c",
    ]  # fmt: skip


def test_pdf(tmp_path: Path) -> None:
    found = read_document(written(tmp_path, "a.pdf", pdf("The wheel turns.", "The stone grinds.")))
    assert found.kind == "pdf" and found.pages == 2
    assert found.text == "The wheel turns.\n\nThe stone grinds."
    assert read_document(written(tmp_path, "paper", pdf("No suffix."))).text == "No suffix."


def test_pdf_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no text on its 1 pages") as refused:
        read_document(written(tmp_path, "scan.pdf", pdf("")))
    assert "OCR" in str(refused.value)
    with pytest.raises(BadFile, match="is no PDF"):
        read_document(written(tmp_path, "text.pdf", "just words"))
    whole = pdf("The wheel turns.")
    with pytest.raises(BadFile, match="damaged"):
        read_document(written(tmp_path, "cut.pdf", whole[:40]))
    key = b"<" + b"00" * 32 + b">"
    locked = b"/Encrypt << /Filter /Standard /V 1 /R 2 /O %s /U %s /P -4 >> /ID [<00> <00>] " % (key, key)
    with pytest.raises(Refused, match="password"):
        read_document(written(tmp_path, "locked.pdf", pdf("Secret.", extra=locked)))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_pdf_is_refused_or_read(tmp_path: Path, seed: int) -> None:
    whole = bytearray(pdf("The wheel turns.", "The stone grinds."))
    for i in range(3):
        whole[20 + (seed * 7919 + i * 104729) % (len(whole) - 20)] = (seed * 31 + i * 17) % 256
    try:
        read_document(written(tmp_path, "a.pdf", bytes(whole)))
    except (BadFile, Refused) as error:
        assert str(tmp_path) in str(error)


def test_pdf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(Refused, match="not installed") as refused:
        read_document(written(tmp_path, "a.pdf", pdf("The wheel turns.")))
    assert 'pip install "bitmill[pdf]"' in str(refused.value)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "no text"),
        ("a.md", b" \n\t\n", "no text"),
        ("a.html", b"<html><script>1</script></html>", "no text"),
        ("a.txt", b"abc\x00def", "zero bytes"),
        ("a.txt", b"caf\xe9", "byte 3 does not fit"),
        ("a.docx", b"PK\x03\x04", "Word document"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        read_document(written(tmp_path, name, data))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not exist"):
        read_document(tmp_path / "none.txt")
    with pytest.raises(Refused, match="is a folder"):
        read_document(tmp_path)
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(Refused, match="68 MB"):
        read_document(large)
