"""The page around its content: one file that works offline and can be mailed.

Nothing is fetched: the policy in its head allows the one style sheet and the one script inside, by their
hashes, and nothing else. Names and text of a model are data: escaped where they stand in the page, and never
markup where the script shows them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT = 1_900_000
"""Bytes of a page: what is left for the tensors' panels is what the rest leaves of this."""

_OWN = "connect-src 'self'; "


@dataclass(frozen=True)
class Live:
    """What a page has that is served: it may ask its own server, and nobody else.

    Attributes:
        style, script: stand behind those of every page.
        said: of its footer.
    """

    style: str
    script: str
    said: str


def page(
    title: str,
    body: str,
    data: Mapping[str, Any],
    panels: Mapping[str, Any] | None = None,
    live: Live | None = None,
) -> str:
    """The whole page.

    Args:
        title: unescaped.
        body: markup, escaped already.
        data: plain values for the script.
        panels: such values by tensor, the most telling first: as many as there is room for.
        live: for a page that is served; a file has none.
    """
    style, script = _beside("page.css"), _beside("page.js")
    said = "Nothing on this page was fetched."
    if live is not None:
        style, script, said = f"{style}{live.style}", f"{script}{live.script}", live.said
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        f"{'' if live is None else _OWN}base-uri 'none'; form-action 'none'"
    )
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}<footer>Made by Bitmill {escape(version('bitmill'))}. {escape(said)}</footer>"
        "</main>"
    )
    room = LIMIT - len(head.encode()) - len(script.encode()) - len(_json(data).encode())
    whole = {**data, "tensors": _fitting(panels or {}, room)}
    return (
        f'{head}<script type="application/json" id="data">{_json(whole)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _fitting(panels: Mapping[str, Any], room: int) -> dict[str, Any]:
    """The first of these that fit into ``room`` bytes."""
    found: dict[str, Any] = {}
    for name, panel in panels.items():
        room -= len(_json({name: panel}).encode())
        if room < 0:
            break
        found[name] = panel
    return found


def _json(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
