"""Lists of modules as few patterns: how quantization settings name the layers they mean; and the patterns of
strangers, which are programs that can run for years, as far as they are harmless."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

from bitmill.core.errors import BadFile

_LONGEST, _SHOWN = 4096, 100
_MOST_REPEATS = 5
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\d*\}")
_BLOCK = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")


def patterns(chosen: Sequence[str], everything: Iterable[str]) -> list[tuple[str, bool]]:
    """Names and regular expressions that match exactly ``chosen`` out of ``everything``.

    A path that is chosen in every block becomes one expression, one that is chosen in some lists its blocks;
    what lies outside the blocks is named. Expressions match to the end of a name, whatever a runtime puts
    before it.

    Returns:
        Pairs of a text and whether it is a regular expression.
    """
    total = _by_path(everything)
    found: list[tuple[str, bool]] = []
    for (stem, path), blocks in _by_path(chosen).items():
        if stem is None:
            found.append((path, False))
            continue
        inside = r"\d+" if blocks == total[stem, path] else "(" + "|".join(map(str, sorted(blocks))) + ")"
        found.append((rf".*{re.escape(stem)}\.{inside}\.{re.escape(path)}$", True))
    return found


def _by_path(names: Iterable[str]) -> dict[tuple[str | None, str], set[int]]:
    paths: defaultdict[tuple[str | None, str], set[int]] = defaultdict(set)
    for name in names:
        match = _BLOCK.fullmatch(name)
        if match is None:
            paths[None, name] = set()
        else:
            paths[match[1], match[3]].add(int(match[2]))
    return dict(paths)


@lru_cache(maxsize=1024)
def compiled(text: str, where: str) -> re.Pattern[str]:
    """A pattern from somebody's settings.

    Matching must end in a moment on any name: a repeated group may neither repeat inside nor choose, and few
    repetitions may follow each other.

    Raises:
        BadFile: it is no pattern, too long, or not certain to end.
    """
    if len(text) > _LONGEST:
        raise BadFile(f"a pattern of {len(text)} characters is too long", where=where)
    if _is_slow(text):
        raise BadFile(
            f"the pattern {text[:_SHOWN]!r} repeats what repeats already: matching it may never end",
            where=where,
            fix="write it without nested repetitions, and with at most five in all",
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadFile(f"{text[:_SHOWN]!r} is not a pattern: {error}", where=where) from error


def _is_slow(text: str) -> bool:
    """Whether a group that repeats, or chooses, is itself repeated; or repetitions are many."""
    bare = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "x", re.sub(r"\\.", "x", text, flags=re.DOTALL))
    if len(_UNBOUNDED.findall(bare)) > _MOST_REPEATS:
        return True
    inside = [False]  # for each open group: whether something in it repeats or chooses
    at = 0
    while at < len(bare):
        sign = bare[at]
        repeat = _UNBOUNDED.match(bare, at)
        if sign == "(":
            inside.append(False)
        elif sign == ")" and len(inside) > 1:
            wild = inside.pop()
            inside[-1] = inside[-1] or wild
            if wild and _UNBOUNDED.match(bare, at + 1):
                return True
        elif sign == "|" or repeat is not None:
            inside[-1] = True
        at = repeat.end() if repeat is not None else at + 1
    return False
