"""What an adapter is taught: rows of a file as token ids, each with a mark on those that count.

Conversations go through the model's own chat template and only the assistant's words count; of a prompt and
its completion only the completion; of plain text everything.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitmill.calibrate.windows import start_token
from bitmill.checkpoint.tokenizer import render_chat
from bitmill.core.errors import Refused

_SPEAKERS = {"human": "user", "gpt": "assistant"}
_ANSWERS = "assistant"
SUFFIXES = (".jsonl", ".ndjson", ".txt", ".md")


@dataclass(frozen=True, eq=False)
class Lesson:
    """One example: token ids ``n``, and for each whether its prediction counts."""

    ids: Tensor
    counts: Tensor

    @property
    def answers(self) -> int:
        """Predictions that count; the first token has none."""
        return int(self.counts[1:].sum())


@dataclass(frozen=True, eq=False)
class Lessons:
    """Examples that teach and examples that judge.

    Attributes:
        facts: file, hash and counts, for the report.
    """

    taught: tuple[Lesson, ...]
    judges: tuple[Lesson, ...]
    facts: Mapping[str, Any]

    def batch(self, step: int, size: int, seed: int) -> list[Lesson]:
        """The examples of a step: every example once before any comes again, in an order that ``seed`` and
        the pass alone decide."""
        found: list[Lesson] = []
        places = range(step * size, (step + 1) * size)
        for turn in range(places[0] // len(self.taught), places[-1] // len(self.taught) + 1):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
            order = torch.randperm(len(self.taught), generator=generator).tolist()
            first = turn * len(self.taught)
            found += [self.taught[order[at - first]] for at in places if 0 <= at - first < len(order)]
        return found


def read_lessons(
    path: Path, tokenizer: PreTrainedTokenizerFast, context: int, seed: int, held_out: Path | None = None
) -> Lessons:
    """Every row of a file, cut to ``context`` tokens.

    Args:
        path: ``.jsonl`` with ``messages`` (``role content``, or ``conversations``: ``from value``),
            ``prompt`` and ``completion``, or ``text`` in each row; or ``.txt``, cut in windows.
        held_out: another such file, which judges; without it one example in ten does, at most 64.

    Raises:
        Refused: the file is not like that, or has too few examples.
    """
    made, said = _read(path, tokenizer, context)
    facts: dict[str, Any] = {"file": str(path), "sha256": _sha256(path), **said}
    if held_out is not None:
        judges, _ = _read(held_out, tokenizer, context)
        facts |= {"held_out_file": str(held_out), "held_out_sha256": _sha256(held_out)}
    else:
        if len(made) < 2:
            raise Refused(
                f"{len(made)} example teaches, and none is left to judge by",
                where=str(path),
                fix="more examples, shorter ones (--context), or --held-out FILE",
            )
        order = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed)).tolist()
        aside = set(order[: min(64, max(1, len(made) // 10))])
        judges = [made[at] for at in sorted(aside)]
        made = [lesson for at, lesson in enumerate(made) if at not in aside]
    facts |= {
        "examples": len(made),
        "tokens": sum(len(lesson.ids) for lesson in made),
        "answer_tokens": sum(lesson.answers for lesson in made),
        "held_out": len(judges),
        "held_out_answer_tokens": sum(lesson.answers for lesson in judges),
        "context": context,
    }
    return Lessons(tuple(made), tuple(judges), facts)


def _read(
    path: Path, tokenizer: PreTrainedTokenizerFast, context: int
) -> tuple[list[Lesson], dict[str, Any]]:
    if not path.is_file():
        raise Refused(f"there is no file {str(path)!r}", fix="--data FILE.jsonl, or FILE.txt")
    if path.suffix.lower() not in SUFFIXES:
        raise Refused(f"{path.name} is not one of: {', '.join(SUFFIXES)}", where=str(path), fix="rename it")
    text = _decoded(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        made, kinds, cut = list(_windows(tokenizer, text, context)), Counter({"text": 1}), 0
    else:
        made, kinds, cut = [], Counter(), 0
        for where, row in _rows(text, str(path)):
            kind, whole = _row(row, tokenizer, where, context)
            kinds[kind] += 1
            for lesson in whole:
                cut += len(lesson.ids) > context
                made.append(Lesson(lesson.ids[:context], lesson.counts[:context]))
    found = [lesson for lesson in made if lesson.answers]
    if not found:
        raise Refused(
            f"no answer of the {len(made)} examples is within {context} tokens"
            if made
            else "there is no text",
            where=str(path),
            fix="a longer --context, or other data",
        )
    said = {"rows": dict(kinds), "cut_to_context": cut, "left_out": len(made) - len(found)}
    return found, said


def _rows(text: str, where: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"{where}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Refused(
                    f"not a line of JSON: {error}", where=f"{where}:{number}", fix="one JSON object a line"
                ) from error


def _row(
    row: Any, tokenizer: PreTrainedTokenizerFast, where: str, context: int
) -> tuple[str, Sequence[Lesson]]:
    known: Mapping[str, Any] = row if isinstance(row, dict) else {}
    talk = known.get("messages") or known.get("conversations")
    if isinstance(talk, list):
        return "messages", _conversation(tokenizer, [_message(m, where) for m in talk], where)
    if isinstance(known.get("prompt"), str) and isinstance(known.get("completion"), str):
        return "prompt+completion", [_pair(tokenizer, known["prompt"], known["completion"])]
    if isinstance(known.get("text"), str):
        return "text", list(_windows(tokenizer, known["text"], context))
    raise Refused(
        'a row holds neither "messages", nor "prompt" and "completion", nor "text"',
        where=where,
        fix='for example {"messages": [{"role": "user", "content": "…"}, '
        '{"role": "assistant", "content": "…"}]}',
    )


def _message(message: Any, where: str) -> dict[str, str]:
    if isinstance(message, dict):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _SPEAKERS.get(role, role), "content": content}
    raise Refused('a message needs "role" and "content", both text', where=where)


def _conversation(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], where: str
) -> list[Lesson]:
    """One example where every turn reads the same with the rest behind it; else, as templates that leave out
    earlier thoughts demand, one for each answer."""
    turns = [at for at, message in enumerate(messages) if message["role"] == _ANSWERS]
    if not turns:
        raise Refused("nobody answers in this conversation", where=where, fix='a message of role "assistant"')
    spans = []
    for at in turns:
        said = render_chat(tokenizer, messages[: at + 1], add_generation_prompt=False)
        asked = render_chat(tokenizer, messages[:at], add_generation_prompt=True) if at else ""
        spans.append((said, _answer(said, asked, messages[at]["content"].strip()), len(said)))
    last = spans[-1][0]
    if all(last.startswith(said) for said, _, _ in spans):
        return [_marked(tokenizer, last, [(start, end) for _, start, end in spans])]
    return [_marked(tokenizer, said, [(start, end)]) for said, start, end in spans]


def _answer(said: str, asked: str, content: str) -> int:
    """Where an answer begins: behind what asks for it, or, where the template says that another way once it
    is answered, with its own words."""
    if said.startswith(asked):
        return len(asked)
    found = said.rfind(content)
    pairs = zip(said, asked, strict=False)
    alike = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(said), len(asked)))
    return max(found, alike)


def _marked(tokenizer: PreTrainedTokenizerFast, text: str, spans: Sequence[tuple[int, int]]) -> Lesson:
    """``text`` as ids; those that begin inside a span of characters count."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts = [any(a <= start < b for a, b in spans) for start, _ in made["offset_mapping"]]
    return Lesson(torch.tensor(made["input_ids"], dtype=torch.int64), torch.tensor(counts, dtype=torch.bool))


def _pair(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> Lesson:
    asked = _ids(tokenizer, prompt)
    begin = start_token(tokenizer)
    asked = asked if begin is None else [begin, *asked]
    answer = _ids(tokenizer, completion) + _end(tokenizer)
    counts = [False] * len(asked) + [True] * len(answer)
    return Lesson(torch.tensor([*asked, *answer]), torch.tensor(counts))


def _windows(tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> Iterator[Lesson]:
    """A document in windows; the last one is shorter and ends with the end of text."""
    begin = start_token(tokenizer)
    first = [] if begin is None else [begin]
    ids = _ids(tokenizer, text) + _end(tokenizer) if text.strip() else []
    step = context - len(first)
    for at in range(0, len(ids), step):
        part = torch.tensor(first + ids[at : at + step])
        yield Lesson(part, torch.ones(len(part), dtype=torch.bool))


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            f"byte {error.start} is not UTF-8", where=str(path), fix="convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise Refused(f"cannot read it: {error.strerror}", where=str(path)) from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
