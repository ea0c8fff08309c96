"""Pieces that every page is made of: cards, panels, tables, commands to copy. Everything is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LONG = 12  # characters of an answer that is shown smaller


@dataclass(frozen=True)
class Card:
    """One answer of the strip at the top.

    Attributes:
        label, value, under: what is answered, the answer, what it is to be compared with.
        state: ``good``, ``fair`` or ``bad``; empty where that is no question.
        why: where the state comes from.
    """

    label: str
    value: str
    under: str
    state: str = ""
    why: str = ""


def strip(cards: Sequence[Card]) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(map(_card, cards))}</div>'


def _card(card: Card) -> str:
    mark = f'<i class="state">{escape(card.state)}</i>' if card.state else ""
    title = f' title="{escape(card.why)}"' if card.why else ""
    kind = f"{card.state} long" if len(card.value) > LONG and " ± " not in card.value else card.state
    return (
        f'<div class="card {kind}"{title}><span class="name">{escape(card.label)}{mark}</span>'
        f"<b>{_softened(card.value)}</b><span>{escape(card.under)}</span></div>"
    )


def _softened(value: str) -> str:
    """The uncertainty in smaller, quieter type."""
    number, sign, error = escape(value).partition(" ± ")
    return f"{number} <small>± {error}</small>" if sign else number


def section(title: str, said: str, content: str) -> str:
    """A heading, a sentence, a panel."""
    return f'<h2>{escape(title)}</h2><p class="quiet">{escape(said)}</p>{panel(content)}'


def panel(content: str) -> str:
    """A frame around markup."""
    return f'<div class="panel">{content}</div>'


def note(text: str) -> str:
    """A remark that a reader should not miss."""
    return f'<p class="note">{escape(text)}</p>'


def rows(
    header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1, marked: Sequence[str] = ()
) -> str:
    """A table of escaped cells; the first ``left`` columns are words, the others numbers.

    Args:
        marked: a class for each line; none where empty.
    """
    css = [' class="n"' if i >= left else "" for i in range(len(header))]
    head = "".join(f"<th{c}>{escape(h)}</th>" for c, h in zip(css, header, strict=True))
    kinds = [f' class="{kind}"' if kind else "" for kind in marked] or [""] * len(lines)
    body = "".join(
        f"<tr{kind}>" + "".join(f"<td{c}>{escape(v)}</td>" for c, v in zip(css, line, strict=True)) + "</tr>"
        for kind, line in zip(kinds, lines, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts(pairs: Sequence[tuple[str, str]], css: str = "") -> str:
    """Labels and values."""
    mark = f' class="{css}"' if css else ""
    listed = "".join(f"<dt>{escape(k)}</dt><dd{mark}>{escape(v)}</dd>" for k, v in pairs)
    return f"<dl>{listed}</dl>"


def commands(lines: Sequence[str]) -> str:
    """Commands, each with a button that copies it."""
    made = "".join(
        f'<div class="command"><code>{escape(line)}</code>'
        '<button type="button" class="copy">copy</button></div>'
        for line in lines
    )
    return f"<h2>Do it again</h2>{panel(made)}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
