"""Tokenizer files as GGUF keys: what llama.cpp needs to cut text into the tokens that Hugging Face does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from bitmill.checkpoint.hf_folder import parse_object
from bitmill.checkpoint.tokenizer_gguf import (
    BYTE,
    CONTROL,
    DIGIT,
    GPT2_WORDS,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORDS,
    Words,
)
from bitmill.checkpoint.tokenizer_words import recognised
from bitmill.core.errors import BadFile, Refused

_BYTE_PIECE = re.compile(r"^<0x[0-9A-F]{2}>$")
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_ELSEWHERE = "write a container of the safetensors kind, for example compressed-tensors"


def gguf_keys(
    carried: Mapping[str, bytes], config: Mapping[str, Any], words: str | None = None
) -> dict[str, Any]:
    """The keys ``tokenizer.*`` for the tokenizer in ``carried``; empty when there is none.

    Values are Python's own (``int`` for u32, ``float`` for f32, lists for arrays), ready for
    :func:`bitmill.checkpoint.gguf_write.encoded`.

    Args:
        carried: ``tokenizer.json`` and, when the model has them, ``tokenizer_config.json`` and
            ``chat_template.jinja``.
        config: the model's configuration: size of the vocabulary, token ids the tokenizer does not name.
        words: llama.cpp's name of how a byte-level tokenizer cuts text into words, where the user knows
            better; None recognises it.

    Raises:
        BadFile: the files are not what they claim to be.
        Refused: a kind of tokenizer that llama.cpp has no counterpart for, or none known here.
    """
    if "tokenizer.json" not in carried:
        if any(name.startswith("tokenizer") for name in carried):
            raise Refused(
                "the model has tokenizer files, but no tokenizer.json",
                fix="save it once with transformers' AutoTokenizer(...).save_pretrained(folder)",
            )
        return {}
    tokenizer = parsed(carried, "tokenizer.json")
    options = parsed(carried, "tokenizer_config.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise Refused(f"a tokenizer of type {model.get('type')!r} cannot be written as GGUF", fix=_ELSEWHERE)
    if model.get("byte_fallback"):
        found = _sentencepiece(tokenizer, config)
    else:
        found = _byte_level(tokenizer, config, words)
    tokens = found["tokens"]
    found.update(_special_ids(tokenizer, options, config, tokens))
    found.update(_around(carried["tokenizer.json"], found))
    keys = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    template = _template(carried, options)
    if template:
        keys["tokenizer.chat_template"] = template
    return keys


def parsed(carried: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in a carried file; empty when there is no such file.

    Raises:
        BadFile: it is not one.
    """
    return parse_object(carried[name], name, name) if name in carried else {}


def _table(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types for every row of the embedding; ids without a token get a placeholder."""
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    added = {int(t["id"]): t for t in tokenizer.get("added_tokens") or ()}
    largest = max([*vocabulary.values(), *added], default=-1) + 1
    size = int(config.get("vocab_size") or largest)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for piece, i in vocabulary.items():
        if 0 <= i < size:
            tokens[i], types[i] = piece, BYTE if _BYTE_PIECE.match(piece) else NORMAL
    for i, token in added.items():
        if 0 <= i < size:
            tokens[i], types[i] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    return tokens, types


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = model.get("merges") or []
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else (m[0], m[1]) for m in merges]  # type: ignore[misc]


def _byte_level(tokenizer: Mapping[str, Any], config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    if name is None:
        name = _words(tokenizer).name
    tokens, types = _table(tokenizer, config)
    types = [NORMAL if kind == BYTE else kind for kind in types]
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": tokens,
        "token_type": types,
        "merges": [f"{left} {right}" for left, right in _pairs(tokenizer["model"])],
        "add_space_prefix": False,
    }


def _words(tokenizer: Mapping[str, Any]) -> Words:
    """How the tokenizer cuts text, by its patterns or else by what they do."""
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    asked = tokenizer.get("pre_tokenizer")
    patterns = word_patterns(asked)
    words = next((w for w in WORDS if w.patterns == patterns), None)
    if words is None and isinstance(asked, dict):
        try:
            with _MalformedIsBadFile():
                words = recognised(asked)
        except BadFile:  # a part that the library cannot build by itself is none that is known here
            words = None
    if words is None or normalizer not in (None, words.normalizer):
        raise Refused(
            "llama.cpp would cut this tokenizer's text into other words: its pre-tokenizer "
            f"{json.dumps(asked)[:300]} with normalizer {normalizer} does as none of "
            f"{', '.join(w.name for w in WORDS)} does",
            where="tokenizer.json",
            fix="if llama.cpp has it under another name, give that: --pre-tokenizer NAME, or "
            f"pre-tokenizer=NAME in the recipe; else {_ELSEWHERE}",
        )
    return words


def word_patterns(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The patterns a byte-level pre-tokenizer applies in turn; None when it does anything else."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    patterns: list[str] = []
    for index, step in enumerate(steps or ()):
        kind, last = step.get("type"), index == len(steps or ()) - 1
        if kind == "ByteLevel" and last and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                patterns.append(GPT2_WORDS)
            return tuple(patterns)
        if kind == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append((step.get("pattern") or {}).get("Regex", ""))
        else:
            return None
    return None


def _sentencepiece(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Scores that make llama.cpp join pieces in the order of the merges: minus the rank of the first merge.

    llama.cpp wants spaces of user-defined tokens as they are typed.
    """
    tokens, types = _table(tokenizer, config)
    model = tokenizer["model"]
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(_pairs(model)):
        rank.setdefault(left + right, index)
    scores = []
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:
            tokens[i] = tokens[i].replace(SPACE, " ")
        if tokens[i] == model.get("unk_token"):
            types[i] = UNKNOWN
        known = -float(rank[tokens[i]] + 1) if tokens[i] in rank else 0.0
        scores.append(
            {UNUSED: _UNUSED_SCORE, CONTROL: _ADDED_SCORE, USER_DEFINED: _ADDED_SCORE}.get(kind, known)
        )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": _space_prefix(tokenizer),
    }


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text gets a space put before it; refuses normalizers that llama.cpp does not have."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = [s.get("type") for s in steps]
    if any(k not in ("Prepend", "Replace") for k in kinds):
        raise Refused(
            f"llama.cpp has no counterpart for this tokenizer's normalizer {json.dumps(normalizer)[:200]}",
            where="tokenizer.json",
            fix=_ELSEWHERE,
        )
    before = tokenizer.get("pre_tokenizer") or {}
    if before.get("type") == "Metaspace":
        return before.get("prepend_scheme", "always") != "never"
    return "Prepend" in kinds


def _special_ids(
    tokenizer: Mapping[str, Any], options: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]
) -> dict[str, int]:
    """Ids of the special tokens, as the tokenizer names them, else as the model's configuration does."""
    vocabulary = {
        **tokenizer["model"]["vocab"],
        **{t["content"]: t["id"] for t in tokenizer.get("added_tokens") or ()},
    }
    found: dict[str, int] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        named = options.get(f"{theirs}_token")
        text = named.get("content") if isinstance(named, dict) else named
        id_ = vocabulary.get(text) if isinstance(text, str) else config.get(f"{theirs}_token_id")
        if isinstance(id_, list):
            id_ = id_[0] if id_ else None
        if isinstance(id_, int) and 0 <= id_ < len(tokens):
            found[f"{ours}_token_id"] = id_
    return found


def _around(raw: bytes, found: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer puts its first and last token around a text: asked of the tokenizer itself."""
    ids = backend(raw).encode("").ids
    return {
        "add_bos_token": bool(ids) and ids[0] == found.get("bos_token_id"),
        "add_eos_token": bool(ids)
        and ids[-1] == found.get("eos_token_id")
        and ids != [found.get("bos_token_id")],
    }


def backend(raw: bytes) -> Tokenizer:
    """The tokenizer that ``tokenizer.json`` describes.

    Raises:
        BadFile: the library cannot make sense of it.
    """
    with _MalformedIsBadFile():
        return Tokenizer.from_str(raw.decode("utf-8"))


class _MalformedIsBadFile:
    """The library's Rust core raises plain Exception, and nothing narrower, for every malformed file."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise BadFile(f"tokenizer.json cannot be read: {error}", where="tokenizer.json") from error


def _template(carried: Mapping[str, bytes], options: Mapping[str, Any]) -> str | None:
    raw = carried.get("chat_template.jinja")
    if raw is not None:
        return raw.decode("utf-8", errors="replace")
    named = options.get("chat_template")
    if isinstance(named, list):  # several templates by name
        named = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return named if isinstance(named, str) else None
