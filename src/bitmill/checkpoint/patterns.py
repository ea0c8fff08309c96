"""Lists of modules as few patterns: how quantization settings name the layers they mean."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

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
