"""What all generated pages share: Markdown from docstrings, tables, and the mark at the top."""

from __future__ import annotations

import re


def marked(text: str) -> str:
    """A docstring in Markdown."""
    lines, listing = [], False
    for line in unquoted(text).splitlines():
        section = re.fullmatch(r"(Args|Attributes|Raises|Returns):", line)
        listing = section is not None or (listing and (line.startswith("    ") or not line))
        entry = re.fullmatch(r"    (\*{0,2}\w[\w, ]*): (.*)", line) if listing else None
        if section is not None:
            lines.append(f"**{section[1]}**\n")
        elif entry is not None:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            lines.append(line)
    return "\n".join(lines).strip("\n")


def unquoted(text: str) -> str:
    """A docstring's roles and double quotes as Markdown's single ones."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def page(mark: str, parts: list[str]) -> str:
    """A whole page."""
    return "\n\n".join([mark, *(p for p in parts if p)]) + "\n"
