"""Texts to windows of token ids: exact counts, seeded choice, a hash, and what was seen before."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitmill.calibrate.corpus import Message, Text
from bitmill.checkpoint.tokenizer import load_tokenizer, render_chat
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.types import Note

SHINGLE = 13  # tokens: what GPT-3's authors took for "seen before" (Brown et al. 2020, appendix C)
_KEEP = 16  # one shingle in 16 is remembered
_CHARACTERS_A_TOKEN = 16  # more than any real text has: what lies beyond needs no tokenizing


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids and where they come from.

    Attributes:
        tokens: ``n length``, int64.
        origin: for each window, the index of its text.
        facts: counts, seed and hashes, for the report.
        notes: what could not be had as asked.
    """

    tokens: Tensor
    origin: tuple[int, ...]
    facts: Mapping[str, Any]
    notes: tuple[Note, ...] = ()


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The tokenizer that travels with a checkpoint; see
    :func:`~bitmill.checkpoint.tokenizer.load_tokenizer`."""
    return load_tokenizer(checkpoint)


def windows(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[Text],
    length: int,
    count: int,
    *,
    seed: int | None,
    chat: bool = False,
) -> Windows:
    """``count`` windows of ``length`` tokens, shared among ``texts`` by their weights.

    Windows do not overlap and start at multiples of ``length``. A text too short for its share gives what it
    has, and the others make up for it.

    Args:
        seed: which windows of a text are taken; None takes them from its start.
        chat: put plain documents through the model's chat template too (conversations always are).

    Raises:
        Refused: every text is shorter than one window; the message says how many tokens there are.
    """
    if length < 2 or count < 1:
        raise Refused(
            f"{count} windows of {length} tokens hold nothing to predict", fix="at least 1 window of 2 tokens"
        )
    limit = max(1 << 16, count * length * _CHARACTERS_A_TOKEN)
    streams = [token_ids(tokenizer, text, chat=chat, limit=limit) for text in texts]
    slots = [len(ids) // length for ids in streams]
    if not any(slots):
        held = (
            ", ".join(f"{text.name}: {len(ids)}" for text, ids in zip(texts, streams, strict=True))
            or "no text"
        )
        raise Refused(
            f"not one window of {length} tokens ({held} tokens)",
            fix="use shorter windows, or name a longer text",
        )
    shares = _shares([t.weight for t in texts], slots, count)
    generator = torch.Generator().manual_seed(seed or 0)
    parts, origin = [], []
    for index, (ids, have, take) in enumerate(zip(streams, slots, shares, strict=True)):
        chosen = (
            torch.arange(take)
            if seed is None
            else torch.randperm(have, generator=generator)[:take].sort().values
        )
        parts.append(ids[: have * length].view(have, length)[chosen])
        origin += [index] * take
    tokens = torch.cat(parts)
    begin = start_token(tokenizer)
    if begin is not None:
        tokens[:, 0] = begin
    facts = _facts(texts, streams, shares, tokens, seed, chat)
    return Windows(tokens, tuple(origin), facts, _shortfall(len(tokens), count, length))


def _shortfall(have: int, wanted: int, length: int) -> tuple[Note, ...]:
    if have == wanted:
        return ()
    said = f"the texts hold {have} windows of {length} tokens, {wanted} were wanted"
    return (Note("short-text", "texts", said, have / wanted),)


def _facts(
    texts: Sequence[Text],
    streams: Sequence[Tensor],
    shares: Sequence[int],
    tokens: Tensor,
    seed: int | None,
    chat: bool,
) -> dict[str, Any]:
    sources = [
        {
            "kind": text.kind,
            "name": text.name,
            "sha256": text.sha256,
            "licence": text.licence,
            "weight": text.weight,
            "tokens_available": len(ids),
            "windows": take,
        }
        for text, ids, take in zip(texts, streams, shares, strict=True)
    ]
    return {
        "sources": sources,
        "windows": tokens.shape[0],
        "window": tokens.shape[1],
        "tokens": tokens.numel(),
        "seed": seed,
        "chat": chat,
        "sha256": tokens_sha256(tokens),
        "shingles": sketch(tokens),
    }


def _shares(weights: Sequence[float], slots: Sequence[int], count: int) -> list[int]:
    """Windows a text: by weight, never more than it has; the rest to the largest fractions."""
    taken = [0] * len(slots)
    for _ in range(len(slots) + 1):
        left = count - sum(taken)
        open_ = [i for i in range(len(slots)) if taken[i] < slots[i]]
        if not left or not open_:
            break
        total = sum(weights[i] for i in open_)
        exact = {i: left * weights[i] / total for i in open_}
        whole = {i: min(int(exact[i]), slots[i] - taken[i]) for i in open_}
        if not any(whole.values()):
            for i in sorted(open_, key=lambda i: -exact[i])[:left]:
                taken[i] += 1
            continue
        for i in open_:
            taken[i] += whole[i]
    return taken


def token_ids(
    tokenizer: PreTrainedTokenizerFast, text: Text, *, chat: bool, limit: int | None = None
) -> Tensor:
    """All of a text as one sequence of ids, without begin-of-text tokens.

    Args:
        chat: render plain documents through the chat template.
        limit: characters to look at.

    Raises:
        Refused: the chat template was asked for and the tokenizer has none.
    """
    if chat and not tokenizer.chat_template:
        raise Refused("the tokenizer has no chat template", fix="leave out --chat")
    asked = [_as_chat(document) for document in text.documents if document.strip()] if chat else []
    chats = [*asked, *text.conversations]
    plain = "" if chat else text.plain[:limit]
    ids: list[int] = []
    if plain.strip():
        ids += tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
    used = len(plain)
    for conversation in chats:
        if limit is not None and used > limit:
            break
        said = _rendered(tokenizer, conversation)
        used += len(said)
        ids += tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _rendered(tokenizer: PreTrainedTokenizerFast, conversation: Sequence[Message]) -> str:
    if not tokenizer.chat_template:
        return "\n\n".join(m["content"] for m in conversation) + "\n\n"
    return render_chat(tokenizer, conversation, add_generation_prompt=False)


def _as_chat(document: str) -> tuple[Message, ...]:
    """A document as an exchange: its first paragraph asks, the rest answers."""
    first, _, rest = document.strip().partition("\n\n")
    answer = {"role": "assistant", "content": rest}
    return ({"role": "user", "content": first}, *([answer] if rest else []))


def start_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The begin-of-text id, where the tokenizer puts one before every text (Llama, Gemma; not SmolLM or
    Qwen)."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    begin = tokenizer.bos_token_id
    return int(begin) if begin is not None and len(ids) > 1 and ids[0] == begin else None


def tokens_sha256(tokens: Tensor) -> str:
    """Hash of ids and their arrangement."""
    head = f"{tuple(tokens.shape)}".encode()
    return hashlib.sha256(head + tokens.to(torch.int32).contiguous().cpu().numpy().tobytes()).hexdigest()


def sketch(tokens: Tensor) -> str:
    """What is remembered of ``n length`` ids: one in 16 of their 13-token shingles, as hashes, in base64."""
    return base64.b64encode(np.unique(_shingles(tokens)).astype("<u4").tobytes()).decode()


def overlap(seen: str, tokens: Tensor) -> float | None:
    """Share of the 13-token shingles of ``tokens`` that occur in the text behind ``seen``; None when too few
    to tell."""
    hashes = _shingles(tokens)
    known = np.frombuffer(base64.b64decode(seen, validate=True), dtype="<u4")
    return float(np.isin(hashes, known).mean()) if len(hashes) else None


def _shingles(tokens: Tensor) -> NDArray[np.uint32]:
    """Hashes of shingles inside rows, those that are multiples of 16: the same choice in every text."""
    ids = tokens.cpu().numpy().astype(np.uint64) + np.uint64(1)
    width = ids.shape[1] - SHINGLE + 1
    if width < 1:
        return np.empty(0, np.uint32)
    mixed = np.zeros((ids.shape[0], width), np.uint64)
    for k in range(SHINGLE):
        mixed = (mixed + ids[:, k : k + width]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    chosen = mixed[mixed % np.uint64(_KEEP) == 0]
    return ((chosen >> np.uint64(20)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
