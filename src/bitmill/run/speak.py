"""A model that reads a prompt in chunks and speaks token by token, with one cache from turn to turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerFast

from bitmill.core.errors import Refused
from bitmill.run.draw import Sampling, draw
from bitmill.run.kept import attend, cache_bytes, is_packed, new_cache
from bitmill.run.ready import Opened, Ready

CHUNK = 512
"""Tokens of a prompt that go through the model at once: what bounds the memory of reading."""

Progress = Callable[[str, int, int, str], None]
Hear = Callable[[str], bool]
"""Takes the next piece of an answer, and says whether it is enough."""

_UNFINISHED = "\ufffd"


@dataclass(frozen=True, eq=False)
class Read:
    """A prompt that is in the cache.

    Attributes:
        tokens: of the prompt.
        reused: how many of them were in the cache before.
        seconds: what reading the others took.
        logits: of the next token.
    """

    tokens: int
    reused: int
    seconds: float
    logits: Tensor


@dataclass(frozen=True)
class Spoken:
    """An answer.

    Attributes:
        text: without control tokens.
        ids: its tokens, without the one that ended it.
        stopped: ``end`` (the model ended it), ``max-tokens``, ``context`` (there is no room for more) or
            ``enough`` (the listener had enough).
        first_seconds: from the end of reading to its first text; None where there was none.
        seconds: from the end of reading to its last text.
    """

    text: str
    ids: tuple[int, ...]
    stopped: str
    first_seconds: float | None
    seconds: float


class Words:
    """Tokens to text, as soon as characters are whole; all pieces together are the text of all tokens.

    Args:
        before: tokens that stand before, and whose text is known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._start, self._said = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes, often its own, sometimes none."""
        self._ids.append(token)
        text = self.rest()
        if text.endswith(_UNFINISHED):
            return ""
        self._start, self._said = self._said, len(self._ids)
        return text

    def rest(self) -> str:
        """What is there and has not been said, unfinished characters and all."""
        known = self._text(self._ids[self._start : self._said])
        return self._text(self._ids[self._start :])[len(known) :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


class Speaker:
    """A model with a cache. What a prompt shares with the one before is not read again.

    Args:
        kv: what the cache stores keys and values as; see :func:`~bitmill.run.kept.new_cache`.
        context: the most tokens of prompt and answer together; what the model was trained for unless given.
        chunk: tokens that are read at once.

    Raises:
        Refused: there is no such cache, or the context is longer than what the model was trained for.
    """

    def __init__(
        self, ready: Ready, kv: str | None = None, *, context: int | None = None, chunk: int = CHUNK
    ) -> None:
        self.ready = ready
        self.kv = kv or ready.dtype
        self.context = context_of(ready.opened, context)
        self._chunk = max(1, chunk)
        self._cache = self._new()
        self._ids: list[int] = []

    def _new(self) -> Cache:
        return new_cache(self.kv, self.ready.model.config, self.ready.dtype)

    def forget(self) -> None:
        """Start with an empty cache; needed after an interruption, which may leave a step half done."""
        self._cache, self._ids = self._new(), []

    @property
    def held_bytes(self) -> int:
        """Bytes that the cache holds."""
        return cache_bytes(self._cache)

    @property
    def packed(self) -> bool:
        """Whether the cache is a packed one, and not transformers' own."""
        return is_packed(self.kv, self.ready.dtype)

    @property
    def held_tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._ids)

    def read(self, ids: Sequence[int], tell: Progress | None = None) -> Read:
        """Bring a prompt into the cache, chunk by chunk.

        Args:
            tell: called as ``tell("read", done, total, text)`` after each chunk.

        Raises:
            Refused: it is empty, or leaves no room for an answer.
        """
        check_room(len(ids), self.context, self.ready.opened.trained)
        started = time.perf_counter()
        attend(self.ready.model, self._cache)
        reused = self._rewound(ids)
        at, logits = reused, torch.empty(0)
        while at < len(ids):
            part = list(ids[at : at + self._chunk])
            logits = self._step(part)
            at += len(part)
            if tell is not None:
                tell("read", at, len(ids), "tokens of the prompt")
        return Read(len(ids), reused, time.perf_counter() - started, logits)

    def speak(
        self,
        read: Read,
        sampling: Sampling,
        limit: int,
        hear: Hear | None = None,
        opened: int = 0,
    ) -> Spoken:
        """Answer the prompt that has just been read.

        Args:
            limit: the most tokens.
            opened: how many tokens at the prompt's end are the beginning of the answer.

        Raises:
            Unsolvable: the model's logits are not numbers.
        """
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(sampling.seed)
        room = self.context - len(self._ids)
        most, stopped = min(limit, room), "max-tokens" if limit <= room else "context"
        tokenizer = self.ready.opened.tokenizer
        words = Words(tokenizer, self._ids[len(self._ids) - opened :])
        logits = read.logits
        ids: list[int] = []
        text, first = "", None
        for count in range(most):
            token = draw(logits, sampling, generator, ids)
            if token in self.ready.opened.ends:
                stopped = "end"
                break
            ids.append(token)
            piece = words.add(token)
            if piece:
                text += piece
                first = time.perf_counter() - started if first is None else first
                if hear is not None and hear(piece):
                    stopped = "enough"
                    break
            if count + 1 < most:
                logits = self._step([token])
        rest = words.rest()
        if rest and hear is not None:
            hear(rest)
        return Spoken(text + rest, tuple(ids), stopped, first, time.perf_counter() - started)

    def _rewound(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` the cache holds, once what it holds besides is taken back."""
        same = next((i for i, (a, b) in enumerate(zip(self._ids, ids, strict=False)) if a != b), None)
        same = min(len(self._ids), len(ids)) if same is None else same
        same = min(same, len(ids) - 1)
        back = len(self._ids) - same
        if same <= 0 or (back and not self._took_back(back)):
            self.forget()
            return 0
        self._ids = self._ids[:same]
        return same

    def _took_back(self, tokens: int) -> bool:
        """Whether the cache could give up its last tokens; one with windows that are full cannot."""
        try:
            self._cache.crop(-tokens)
        except (Refused, RuntimeError, ValueError):
            return False
        return int(self._cache.get_seq_length()) == len(self._ids) - tokens

    def _step(self, ids: list[int]) -> Tensor:
        """The logits after these tokens, which go into the cache."""
        model = self.ready.model
        with torch.inference_mode():
            found = model(
                torch.tensor([ids], device=model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._ids += ids
            return found.logits[0, -1, : len(self.ready.opened.tokenizer)]


def context_of(model: Opened, asked: int | None = None) -> int:
    """The context that is asked for, or what the model was trained for.

    Raises:
        Refused: it is longer than that, or nothing says what that is.
    """
    if asked is None and not model.trained:
        raise Refused("nothing says what context the model was trained for", fix="--context 2048")
    if asked is not None and model.trained and asked > model.trained:
        raise Refused(
            f"a context of {asked:,} tokens is longer than the {model.trained:,} the model was trained for",
            where=model.name,
            fix=f"--context {model.trained} or less",
        )
    return asked or model.trained


def check_room(tokens: int, context: int, trained: int, answer: int = 1) -> None:
    """Refuse a prompt that is empty, or leaves no room for an answer.

    Raises:
        Refused: with the numbers, and what would work.
    """
    if not tokens:
        raise Refused("the prompt is empty", fix="say something")
    if tokens + answer <= context:
        return
    longer = f"--context {tokens + answer} or more (the model takes {trained:,})"
    over = tokens + answer - context
    shorter = f"shorten it by {over:,} tokens; `bitmill summarize --parts` reads longer documents"
    raise Refused(
        f"the prompt has {tokens:,} tokens, and the context is {context:,}",
        fix=longer if tokens + answer <= trained else shorter,
    )


def to_json(read: Read, spoken: Spoken) -> dict[str, Any]:
    """Words, counts and times as plain values."""
    steps = len(spoken.ids) - 1
    return {
        "answer": spoken.text,
        "prompt_tokens": read.tokens,
        "reused_tokens": read.reused,
        "answer_tokens": len(spoken.ids),
        "stopped": spoken.stopped,
        "seconds": {
            "read": read.seconds,
            "first": None if spoken.first_seconds is None else read.seconds + spoken.first_seconds,
            "last": read.seconds + spoken.seconds,
        },
        "tokens_per_second": {
            "read": (read.tokens - read.reused) / max(read.seconds, 1e-9),
            "write": steps / max(spoken.seconds, 1e-9) if steps > 0 else None,
        },
    }
