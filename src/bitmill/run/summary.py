"""A document in a few bullets: the prompt, how the document is fitted to the context, the answer in lines.

A document that is too long is cut, and what was left out is told to the token; or it is read in parts, each
summarized alone, and the parts' bullets once more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bitmill.core.errors import Refused
from bitmill.run.chat import Conversation, defused
from bitmill.run.document import Document
from bitmill.run.draw import Sampling
from bitmill.run.speak import Hear, Progress, Read, Speaker, Spoken, to_json

ANSWER = 400
"""Tokens that five bullets may take."""
OPENING = "-"
"""How every answer is made to begin: small models keep to a list that has begun."""
_BULLET = re.compile(r"\s*(?:-(?!-)|[*•–](?=\s)|\d{1,2}[.)](?=\s))\s*(?P<said>\S.*)")
_MOST_ROUNDS = 8
_SEAMS = 16  # tokens more that a text may have between the words of the question than alone
_LEAST = 32  # tokens of a document that are worth a question


@dataclass(frozen=True)
class Asked:
    """What is wanted of a document.

    Attributes:
        bullets: how many.
        answer: the most tokens of an answer.
        parts: read all of a document that is too long, part by part; it is cut otherwise.
    """

    bullets: int = 5
    answer: int = ANSWER
    parts: bool = False
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Piece:
    """A run of a document: characters ``start … end``, which are ``tokens`` tokens."""

    start: int
    end: int
    tokens: int


@dataclass(frozen=True)
class Fitted:
    """What of a document is read.

    Attributes:
        tokens: of the whole document.
        pieces: that are read, in order.
        left_out: tokens that nobody reads.
        next_words: where those begin.
    """

    tokens: int
    pieces: tuple[Piece, ...]
    left_out: int = 0
    next_words: str = ""

    def __str__(self) -> str:
        if self.left_out:
            read = self.pieces[0].tokens
            return (
                f"the document has {self.tokens:,} tokens; the first {read:,} are read, and the last "
                f"{self.left_out:,}, from {self.next_words!r} on, are not (--parts reads all of it)"
            )
        if len(self.pieces) > 1:
            return f"the document has {self.tokens:,} tokens; it is read in {len(self.pieces)} parts"
        return f"the document has {self.tokens:,} tokens; all of it is read"


@dataclass(frozen=True, eq=False)
class Summary:
    """A document in bullets.

    Attributes:
        bullets: as many as the model wrote, at most those that were asked for.
        text: its answer as it stands.
        fitted: what was read of the document.
        control: control words that the document said, and how often: they are ordinary words to the model.
        turns: everything that was read and said on the way, the answer last.
        first_seconds, last_seconds: from the start to the answer's first and last words.
        cache_bytes, cache_tokens: the most that the cache held.
    """

    bullets: tuple[str, ...]
    text: str
    fitted: Fitted
    control: dict[str, int]
    turns: tuple[tuple[Read, Spoken], ...]
    first_seconds: float | None
    last_seconds: float
    cache_bytes: int
    cache_tokens: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        read, spoken = self.turns[-1]
        return {
            "bullets": list(self.bullets),
            "text": self.text,
            "stopped": spoken.stopped,
            "document": {
                "tokens": self.fitted.tokens,
                "pieces": [asdict(piece) for piece in self.fitted.pieces],
                "left_out_tokens": self.fitted.left_out,
                "said": str(self.fitted),
                "control_words": self.control,
            },
            "passes": len(self.turns),
            "read_tokens": sum(r.tokens - r.reused for r, _ in self.turns),
            "written_tokens": sum(len(s.ids) for _, s in self.turns),
            "seconds": {"first": self.first_seconds, "last": self.last_seconds},
            "tokens_per_second": to_json(read, spoken)["tokens_per_second"],
        }


class Bullets:
    """Listens to an answer until it has enough whole bullets."""

    def __init__(self, wanted: int, hear: Hear | None = None) -> None:
        self._wanted, self._hear = wanted, hear
        self.text = ""

    def __call__(self, piece: str) -> bool:
        before = len(self.text)
        self.text += piece
        enough = len(bullets_of(self.text.rpartition("\n")[0])) >= self._wanted
        if enough:
            self.text = "\n".join(self.text.split("\n")[:-1]).rstrip()
        if self._hear is not None and self.text[before:]:
            enough |= self._hear(self.text[before:])
        return enough


def bullets_of(text: str) -> tuple[str, ...]:
    """What the lines that are bullets say."""
    found = (_BULLET.fullmatch(line) for line in text.split("\n"))
    return tuple(match["said"].strip() for match in found if match is not None)


def summarize(
    speaker: Speaker,
    document: Document,
    asked: Asked | None = None,
    *,
    hear: Hear | None = None,
    tell: Progress | None = None,
) -> Summary:
    """The document in bullets.

    Args:
        hear: gets the answer piece by piece; not what is said of single parts.
        tell: called as ``tell("read", done, total, text)`` while reading.

    Raises:
        Refused: the context has no room for any of the document.
    """
    return _Work(speaker, asked or Asked(), hear, tell).summary(document)


def fit(text: str, speaker: Speaker, asked: Asked) -> Fitted:
    """What of a text is read: all of it, its beginning, or (with ``parts``) pieces.

    Raises:
        Refused: there is no room for any.
    """
    tokenizer = speaker.ready.opened.tokenizer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    frame = len(_prompt(speaker, "", asked.bullets)[0])
    room = speaker.context - asked.answer - frame
    if len(ends) <= room - _SEAMS:
        return Fitted(len(ends), (Piece(0, len(text), len(ends)),))
    if room - _SEAMS < _LEAST:
        raise Refused(
            f"a context of {speaker.context:,} tokens has room for {max(room - _SEAMS, 0):,} of the document "
            f"beside {frame:,} of the question and {asked.answer:,} of the answer",
            fix=f"--context {asked.answer + frame + _SEAMS + _LEAST} or more, or a smaller --max-tokens",
        )
    pieces = _pieces(text, ends, room - _SEAMS)
    if asked.parts:
        return Fitted(len(ends), pieces)
    first = pieces[0]
    rest = text[first.end :].split(maxsplit=8)
    return Fitted(len(ends), (first,), len(ends) - first.tokens, " ".join(rest[:8]))


def _pieces(text: str, ends: Sequence[int], room: int) -> tuple[Piece, ...]:
    """Runs of at most ``room`` tokens, the last ones of a paragraph, sentence or word where there is one."""
    found: list[Piece] = []
    token = start = 0
    while token < len(ends):
        last = min(token + room, len(ends))
        end = ends[last - 1]
        if last < len(ends):
            end = _seam(text, start, end)
            last = max(token + 1, sum(e <= end for e in ends[token:last]) + token)
        found.append(Piece(start, end, last - token))
        token, start = last, end
    return tuple(found)


def _seam(text: str, start: int, end: int) -> int:
    """The best place to cut, in the last quarter before ``end``."""
    least = end - (end - start) // 4
    for mark in ("\n\n", ". ", "\n", " "):
        at = text.rfind(mark, least, end)
        if at > start:
            return at + len(mark)
    return end


class _Work:
    """One summary on its way."""

    def __init__(self, speaker: Speaker, asked: Asked, hear: Hear | None, tell: Progress | None) -> None:
        self._speaker, self._asked, self._hear, self._tell = speaker, asked, hear, tell
        self._turns: list[tuple[Read, Spoken]] = []
        self._bytes = self._tokens = 0

    def summary(self, document: Document) -> Summary:
        text, control = defused(document.text, self._speaker.ready.opened.tokenizer)
        whole = fitted = fit(text, self._speaker, self._asked)
        for _ in range(_MOST_ROUNDS):
            if len(fitted.pieces) == 1:
                break
            text = "\n".join(self._pass(text[p.start : p.end], None)[0] for p in fitted.pieces)
            fitted = fit(text, self._speaker, self._asked)
        else:
            raise Refused(
                f"{_MOST_ROUNDS} rounds of parts did not make the document short enough",
                fix="a longer --context, or fewer --bullets",
            )
        before = sum(r.seconds + s.seconds for r, s in self._turns)
        only = fitted.pieces[0]
        answer, read, spoken = self._pass(text[only.start : only.end], self._hear)
        first = None if spoken.first_seconds is None else before + read.seconds + spoken.first_seconds
        return Summary(
            bullets_of(answer)[: self._asked.bullets],
            answer,
            whole,
            control,
            tuple(self._turns),
            first,
            before + read.seconds + spoken.seconds,
            self._bytes,
            self._tokens,
        )

    def _pass(self, text: str, hear: Hear | None) -> tuple[str, Read, Spoken]:
        """One text in bullets."""
        ids, opening = _prompt(self._speaker, text, self._asked.bullets)
        read = self._speaker.read(ids, self._tell)
        listener = Bullets(self._asked.bullets, hear)
        listener(OPENING)
        spoken = self._speaker.speak(read, self._asked.sampling, self._asked.answer, listener, opening)
        self._turns.append((read, spoken))
        if self._speaker.held_bytes > self._bytes:
            self._bytes, self._tokens = self._speaker.held_bytes, self._speaker.held_tokens
        return listener.text, read, spoken


def _prompt(speaker: Speaker, text: str, bullets: int) -> tuple[list[int], int]:
    """The tokens that a model reads, and how many of them open its answer."""
    many = "one bullet point" if bullets == 1 else f"{bullets} bullet points"
    asked = (
        f"Summarize the following text in {many}, each one short sentence.\n\n"
        f"{text or '.'}\n\n"
        f'Write {many} about the text above. Begin each with "- ".'
    )
    conversation = Conversation(speaker.ready.opened.tokenizer)
    return conversation.ask(asked if not conversation.plain else f"{asked}\n\n", OPENING)
