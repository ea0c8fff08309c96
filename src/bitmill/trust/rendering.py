"""A chat template run where it can do no harm: in a process of its own, with limits on time and memory.

A loop inside a loop can take a year in any sandbox; only ending the process ends it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from jinja2.exceptions import TemplateError

from bitmill.checkpoint.chat_template import sandbox

if sys.platform != "win32":
    import resource

SECONDS = 5
_MOST_BYTES = 1 << 30
_LONGEST = 4 << 20
_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Rendered:
    """What became of one chat: so many characters, or why there are none."""

    characters: int
    failed: str = ""


def render(
    template: str,
    chats: Sequence[Sequence[Mapping[str, str]]],
    tokens: Mapping[str, str],
    seconds: int = SECONDS,
) -> tuple[Rendered, ...] | None:
    """What the template makes of each chat; None where it did not end in time or room.

    Args:
        tokens: texts that the template is given by name (``bos_token``).
        seconds: of a processor; four times as many may pass.
    """
    said = {"template": template, "chats": [list(chat) for chat in chats], "tokens": dict(tokens)}
    asked = json.dumps({**said, "seconds": seconds})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bitmill.trust.rendering"],
            input=asked, capture_output=True, text=True, timeout=4 * seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    if done.returncode or not done.stdout:
        return None
    return tuple(Rendered(size, failed) for size, failed in json.loads(done.stdout))


def _raise(message: str) -> str:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now(timezone.utc).strftime(form)


def _dumped(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=options.get("indent"))


def _one(template: Any, chat: list[dict[str, str]], tokens: dict[str, str]) -> tuple[int, str]:
    size = 0
    try:
        for piece in template.generate(messages=chat, add_generation_prompt=True, **tokens):
            size += len(piece)
            if size > _LONGEST:
                return size, f"it makes more than {_LONGEST:,} characters"
    except _FAULTS as error:
        return size, f"{type(error).__name__}: {str(error)[:200]}"
    return size, ""


def _limit(seconds: int) -> None:
    """Limits of this process; where there are none, the one that waits ends it."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))


def main() -> None:
    """Render what standard input asks for, and say on standard output how long it became."""
    asked = json.loads(sys.stdin.read())
    _limit(asked["seconds"])
    environment = sandbox()
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    environment.filters["tojson"] = _dumped
    try:
        template = environment.from_string(asked["template"])
        found = [_one(template, chat, asked["tokens"]) for chat in asked["chats"]]
    except _FAULTS as error:
        found = [(0, f"{type(error).__name__}: {str(error)[:200]}") for _ in asked["chats"]]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
