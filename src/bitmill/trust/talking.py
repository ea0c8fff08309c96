"""The tokenizer and the chat template: what a model is fed, which no weight shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from bitmill.checkpoint.chat_template import scan, words_looked_for
from bitmill.checkpoint.hf_folder import parse_object
from bitmill.checkpoint.tokenizer import chat_parity, load_tokenizer, token_parity
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, BitmillError, Refused
from bitmill.trust.findings import Finding, of_error
from bitmill.trust.rendering import SECONDS, render
from bitmill.trust.stored import Stored

_SHOWN = 6
_ASKED: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
)
_MOST_MADE = 100_000  # characters of a chat with two short messages


def templates(model: Stored, carried: Mapping[str, bytes]) -> dict[str, str]:
    """Every chat template of a model, by the file or key it stands in."""
    found: dict[str, Any] = {}
    if model.gguf:
        found = {k: v for k, v in model.config.items() if k.startswith("tokenizer.chat_template")}
        return {key: text for key, text in found.items() if isinstance(text, str) and text}
    for name in ("chat_template.jinja",):
        if name in carried:
            found[name] = carried[name].decode("utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if name in carried:
            said = parse_object(carried[name], model.where, name).get("chat_template")
            some = said if isinstance(said, list) else [{"name": "", "template": said}]
            for one in some:
                if isinstance(one, dict) and isinstance(one.get("template"), str):
                    found[f"{name}: chat_template {one.get('name', '')}".strip()] = one["template"]
    return {key: text for key, text in found.items() if isinstance(text, str) and text}


def look_at_templates(model: Stored, carried: Mapping[str, bytes]) -> Iterator[Finding]:
    """What each template's syntax shows, see :mod:`~bitmill.checkpoint.chat_template`."""
    try:
        found = templates(model, carried)
    except BadFile as error:
        yield of_error(error, "structure")
        return
    for place, text in found.items():
        where = f"{model.where}: {place}"
        for remark in scan(text):
            level = "error" if remark.grave else "warning"
            at = f"{where}, line {remark.line}" if remark.line else where
            fix = "do not render it outside a sandbox; take the original model's template" * remark.grave
            yield Finding(level, "template", f"the chat template is a program: {remark.what}", at, fix)
        words = words_looked_for(text)
        if words:
            shown = ", ".join(repr(word) for word in words[:_SHOWN])
            more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
            yield Finding("note", "template", f"the chat template looks for {shown}{more} in texts", where)


def look_at_tokenizer(checkpoint: Checkpoint, base: Checkpoint | None) -> Iterator[Finding]:
    """Whether the tokenizer loads, fits the embedding, renders a chat in bounds, and is the base's."""
    where = str(checkpoint.path)
    try:
        ours = load_tokenizer(checkpoint)
    except Refused as error:
        yield of_error(error, "tokenizer", "warning")
        return
    except BadFile as error:
        yield of_error(error, "tokenizer")
        return
    embed = checkpoint.tensors.get("model.embed_tokens.weight")
    ids = [*ours.get_vocab().values(), *ours.added_tokens_decoder]
    if embed is not None and ids and max(ids) >= embed.shape[0]:
        what = f"the tokenizer has ids up to {max(ids):,}, and the embedding {embed.shape[0]:,} rows"
        yield Finding("error", "tokenizer", what, where, "fetch tokenizer and weights of one model")
    if isinstance(ours.chat_template, str) and not any(r.grave for r in scan(ours.chat_template)):
        yield from _rendered(ours, where)
    if base is None:
        return
    try:
        theirs = load_tokenizer(base)
    except BitmillError as error:
        yield of_error(error, "tokenizer", "warning")
        return
    fix = f"take the tokenizer's files of {base.path}"
    for text in token_parity(ours, theirs):
        yield Finding("error", "tokenizer", f"against the base: {text}", where, fix)
    for text in chat_parity(ours, theirs):
        yield Finding("warning", "template", f"against the base: {text}", where, fix)


def _rendered(tokenizer: PreTrainedTokenizerFast, where: str) -> Iterator[Finding]:
    """Short chats through the template: it must end, and not make a book of them."""
    tokens = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    made = render(tokenizer.chat_template, _ASKED, tokens)
    if made is None:
        what = f"the chat template did not end within {SECONDS} s and 1 GiB on two short chats"
        fix = "do not render it; take the original model's template"
        yield Finding("error", "template", what, where, fix)
        return
    if made[0].failed:
        what = f"the chat template fails on one short message: {made[0].failed}"
        yield Finding("warning", "template", what, where)
    for chat, text in zip(_ASKED, made, strict=True):
        given = sum(len(message["content"]) for message in chat)
        if text.characters > _MOST_MADE:
            what = f"the chat template makes {text.characters:,} characters of {given}"
            yield Finding("warning", "template", what, where)
