"""How a byte-level tokenizer cuts text into words, recognised by what it does to text rather than how it is
written down: two patterns that cut every probe alike are one to llama.cpp."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from bitmill.checkpoint.tokenizer_gguf import WORDS, Words, pre_tokenizer_of

_PIECES = (
    *("a", "Zq", "é", "ß", "ǅ", "ع", "中文", "ไทย", "\u0301"),
    *("1", "23", "456", "7890", "٣", "²"),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000"),
    *("'s", "'LL", "'", ".", "!!", "/", "_", "-", "(", "<|", "🙂", "\u200d"),
)
"""What patterns tell apart: letters by case and script, marks, digits by number, spaces, line ends, signs."""
_LONGEST = 3  # pieces of a probe: the rules in use look at most one class ahead and one behind


def recognised(pre_tokenizer: Mapping[str, Any]) -> Words | None:
    """The way of cutting words that treats every probe as this part of a ``tokenizer.json`` does, or None."""
    asked = _built(json.dumps(pre_tokenizer))
    if asked is None:
        return None
    left = [(words, _built(json.dumps(pre_tokenizer_of(words)))) for words in WORDS]
    for probe in _probes():
        cut = asked.pre_tokenize_str(probe)
        left = [(words, made) for words, made in left if made and made.pre_tokenize_str(probe) == cut]
        if not left:
            return None
    return left[0][0]


def _probes() -> Iterator[str]:
    for length in range(1, _LONGEST + 1):
        for pieces in itertools.product(_PIECES, repeat=length):
            yield "".join(pieces)


def _built(text: str) -> PreTokenizer | None:
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    whole = {"version": "1.0", "added_tokens": [], "model": empty, "pre_tokenizer": json.loads(text)}
    return Tokenizer.from_str(json.dumps(whole)).pre_tokenizer
