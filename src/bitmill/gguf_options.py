"""Options of GGUF recipes as llama.cpp's own tools spell them: types by tensor, names of pre-tokenizers."""

from __future__ import annotations

import re

from bitmill.allocation.mixture import Mixture
from bitmill.core import registry
from bitmill.core.errors import BadRecipe

_NOT_EVERYWHERE = (
    (r"\\[A-Z]", "llama.cpp puts patterns in lower case first, which turns a class like \\D into \\d"),
    (r"\[[.:=]", "classes like [[:digit:]] are not portable; write [0-9]"),
    (r"\[\^?\]", "an empty class [] is not portable"),
    (r"\(\?(?![:=!])", "only (?:…), (?=…) and (?!…) are portable"),
    (r"[*+?}]\+", "possessive repeats are not portable"),
    (r"\([^()]*[*+][^()]*\)[*+{]", "a repeat of what repeats can take for ever"),
)
"""What means something else to C++'s std::regex, which llama.cpp uses, than to Python."""


def tensor_type(pattern: str, kind: str) -> tuple[str, str]:
    """A pattern on llama.cpp's tensor names and the type it gives them, as ``--tensor-type`` has it.

    The pattern is put in lower case, as llama.cpp does.

    Raises:
        BadRecipe: the pattern does not compile or means something else to llama.cpp, or the type is none.
    """
    where = f"{pattern}={kind}"
    if not pattern or "/" in pattern:
        raise BadRecipe("a pattern is not empty and has no slash", where=where, fix=r"e.g. blk\.0\.ffn_down")
    for strange, why in _NOT_EVERYWHERE:
        if re.search(strange, pattern):
            raise BadRecipe(f"pattern {pattern!r}: {why}", where=where)
    pattern = pattern.lower()
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadRecipe(f"pattern {pattern!r} does not compile: {error}", where=where) from error
    grid = registry.find_grid(kind.strip().lower())
    if grid is None and kind.strip().upper() in Mixture.names():
        raise BadRecipe(
            f"{kind} is a mixture, and one tensor has one type", where=where, fix="for example q4_k or q6_k"
        )
    return pattern, str(grid or registry.parse_grid(kind))


def pre_tokenizer(text: str) -> str:
    """A name as llama.cpp gives its pre-tokenizers: ``llama-bpe``, ``qwen2``.

    Raises:
        BadRecipe: it cannot be one.
    """
    name = text.strip().lower()
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) is None:
        raise BadRecipe(f"{text!r} is no pre-tokenizer's name", fix="for example llama-bpe or qwen2")
    return name
