"""Tokenizer files rebuilt from the keys of a GGUF file: ``tokenizer.json`` and what goes with it.

Two kinds of vocabulary exist: byte-level BPE (``gpt2``), whose way of cutting text into words is named by
``tokenizer.ggml.pre``, and SentencePiece-like BPE with byte fallback (``llama``), whose merges follow scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bitmill.core.errors import BadFile, Refused

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of ``tokenizer.ggml.token_type``."""
SPACE = "\u2581"
GPT2_WORDS = "gpt2"
"""Stands for the word pattern built into Hugging Face's ``ByteLevel``."""
DIGIT = r"\p{N}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Words:
    """One way of cutting text into words before byte-level BPE.

    Attributes:
        name: llama.cpp's name of it.
        patterns: applied one after the other; :data:`GPT2_WORDS` and :data:`DIGIT` have types of their own.
        ignore_merges: a word that is in the vocabulary is one token whatever the merges say.
        normalizer: Hugging Face's; llama.cpp has none, and expects composed text.
        adds_bos: what llama.cpp does when the file does not say.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    normalizer: str | None = None
    adds_bos: bool = False


WORDS: Sequence[Words] = (
    Words("gpt-2", (GPT2_WORDS,)),
    Words("smollm", (DIGIT, GPT2_WORDS)),
    Words("llama-bpe", (_LLAMA3,), ignore_merges=True, adds_bos=True),
    Words("qwen2", (_LLAMA3.replace("{1,3}", ""),), normalizer="NFC"),
    Words("tekken", (_TEKKEN,), ignore_merges=True, adds_bos=True),
)
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "gpt-2",
        "starcoder": "smollm",
        "refact": "smollm",
        "llama3": "llama-bpe",
        "llama-v3": "llama-bpe",
        "deepseek-r1-qwen": "qwen2",
    }
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_PAD = re.compile(r"^\[PAD\d+\]$")


class _Keys:
    """The tokenizer's keys, checked against each other."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.tokens: list[str] = self.strings("tokens")
        if not self.tokens:
            raise BadFile("the file holds no tokens", where=where)
        self.types: list[int] = self.listed("token_type", int, [NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise BadFile(f"{len(self.tokens)} tokens have {len(self.types)} types", where=where)
        self.architecture = str(metadata.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def listed(self, name: str, kind: type, default: list[Any]) -> list[Any]:
        found = self.get(name, default)
        if not isinstance(found, list) or not all(isinstance(x, kind) for x in found):
            raise BadFile(f"tokenizer.ggml.{name} is not a list of {kind.__name__}", where=self.where)
        return found

    def strings(self, name: str) -> list[str]:
        return self.listed(name, str, [])

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.get(name, default))

    def id(self, name: str) -> int | None:
        found = self.get(f"{name}_token_id")
        if found is None:
            return None
        if not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise BadFile(
                f"tokenizer.ggml.{name}_token_id is {found!r}; there are {len(self.tokens)} tokens",
                where=self.where,
            )
        return found

    def token(self, name: str) -> str | None:
        found = self.id(name)
        return None if found is None else self.tokens[found]


def files_of(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and, when the file has one,
    ``chat_template.jinja``; empty when the file holds no tokenizer.

    Args:
        metadata: all keys of the file.
        where: the file, for messages.

    Raises:
        BadFile: keys contradict each other.
        Refused: a kind of vocabulary or of word splitting that is not known here.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return {}
    keys = _Keys(metadata, where)
    if model == "gpt2":
        words = words_named(keys.get("pre"), where)
        tokenizer, adds_bos = _byte_level(keys, words), words.adds_bos
    elif model == "llama":
        tokenizer, adds_bos = _sentencepiece(keys), True
    else:
        raise Refused(
            f"tokenizer model {model!r} of this GGUF file cannot be rebuilt",
            where=where,
            fix="put the original tokenizer.json beside the output",
        )
    tokenizer["post_processor"] = _post_processor(keys, adds_bos)
    files = {
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(_tokenizer_config(keys)),
        "generation_config.json": _json(_generation_config(keys)),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    return files


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def words_named(pre: Any, where: str) -> Words:
    """The word splitting that llama.cpp calls ``pre``.

    Raises:
        BadFile: no text at all.
        Refused: unknown here.
    """
    if not isinstance(pre, str):
        raise BadFile("tokenizer.ggml.pre is not a text", where=where)
    name = _ALIASES.get(pre, pre)
    for words in WORDS:
        if words.name == name:
            return words
    raise Refused(
        f"the word splitting {pre!r} (tokenizer.ggml.pre) cannot be rebuilt as a tokenizer.json",
        where=where,
        fix=f"known are {', '.join(w.name for w in WORDS)}; start from the safetensors model instead",
    )


def _vocabulary(keys: _Keys) -> dict[str, int]:
    """Piece to id, without the placeholders that only fill the embedding's last rows."""
    return {
        piece: i
        for i, (piece, kind) in enumerate(zip(keys.tokens, keys.types, strict=True))
        if not (kind == UNUSED and _PAD.match(piece))
    }


def _tokenizer(keys: _Keys, added: Iterable[dict[str, Any]], parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        **parts,
    }


def _added(id_: int, content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, **flags, "special": special}


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **flags: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **flags,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


def _byte_level(keys: _Keys, words: Words) -> dict[str, Any]:
    vocabulary = _vocabulary(keys)
    merges = [_merge(text, vocabulary, keys.where) for text in keys.strings("merges")]
    marked = [
        _added(i, piece, kind == CONTROL)
        for i, (piece, kind) in enumerate(zip(keys.tokens, keys.types, strict=True))
        if kind in (CONTROL, USER_DEFINED) and piece
    ]
    parts = {
        "normalizer": {"type": words.normalizer} if words.normalizer else None,
        "pre_tokenizer": pre_tokenizer_of(words),
        "decoder": {**_BYTES, "add_prefix_space": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=words.ignore_merges),
    }
    return _tokenizer(keys, marked, parts)


def pre_tokenizer_of(words: Words) -> dict[str, Any]:
    """The part of a ``tokenizer.json`` that cuts text this way."""
    own = {DIGIT: {"type": "Digits", "individual_digits": True}, GPT2_WORDS: {**_BYTES, "use_regex": True}}
    steps = [own.get(p) or _split(p) for p in words.patterns]
    if words.patterns[-1] != GPT2_WORDS:
        steps.append({**_BYTES, "use_regex": False})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _merge(text: str, vocabulary: Mapping[str, int], where: str) -> tuple[str, str]:
    at = text.find(" ", 1)
    left, right = text[:at], text[at + 1 :]
    if at < 1 or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
        raise BadFile(f"merge {text[:60]!r} does not join two tokens into a third", where=where)
    return left, right


def _sentencepiece(keys: _Keys) -> dict[str, Any]:
    gemma = keys.architecture.startswith("gemma")
    # Spaces of user-defined pieces are stored as they are typed; the model's own vocabulary marks them.
    keys.tokens = [
        piece.replace(" ", SPACE) if kind == USER_DEFINED and not piece.strip(" ") else piece
        for piece, kind in zip(keys.tokens, keys.types, strict=True)
    ]
    vocabulary = _vocabulary(keys)
    scores = keys.listed("scores", (int, float), [])  # type: ignore[arg-type]
    if len(scores) != len(keys.tokens):
        raise BadFile(f"{len(keys.tokens)} tokens have {len(scores)} scores", where=keys.where)
    # Gemma's scores do not follow the order of its merges; the order of its vocabulary does.
    rank = dict(vocabulary) if gemma else {p: -scores[i] for p, i in vocabulary.items()}
    joined = {
        p
        for p, i in vocabulary.items()
        if keys.types[i] == NORMAL or (gemma and keys.types[i] == USER_DEFINED)
    }
    marked = [
        _added(i, piece, kind != USER_DEFINED)
        for i, (piece, kind) in enumerate(zip(keys.tokens, keys.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and piece
    ]
    prefix = keys.flag("add_space_prefix", not gemma)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    unknown = keys.token("unknown") or next(
        (p for p, k in zip(keys.tokens, keys.types, strict=True) if k == UNKNOWN), None
    )
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocabulary,
            merges_of(vocabulary, rank, joined),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }
    return _tokenizer(keys, marked, parts)


def merges_of(
    vocabulary: Mapping[str, int], rank: Mapping[str, float], joined: set[str]
) -> list[tuple[str, str]]:
    """Every way of joining two pieces into one of ``joined``, best rank first, as SentencePiece would."""
    found = [
        (rank[piece], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in joined and piece[cut:] in joined
    ]
    found.sort(key=lambda m: m[:3])
    return [(left, right) for *_, left, right in found]


def _post_processor(keys: _Keys, adds_bos: bool) -> dict[str, Any] | None:
    """The template that puts the first and last token around a text."""
    before = [keys.token("bos")] if keys.flag("add_bos_token", adds_bos) else []
    after = [keys.token("eos")] if keys.flag("add_eos_token", False) else []
    special = [t for t in (*before, *after) if t is not None]
    if not special:
        return None

    def template(letter: str, kind: int) -> list[dict[str, Any]]:
        around = [
            [{"SpecialToken": {"id": t, "type_id": kind}} for t in side if t is not None]
            for side in (before, after)
        ]
        return [*around[0], {"Sequence": {"id": letter, "type_id": kind}}, *around[1]]

    ids = {t: {"id": t, "ids": [keys.tokens.index(t)], "tokens": [t]} for t in special}
    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": ids,
    }


def _tokenizer_config(keys: _Keys) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {ours: keys.token(theirs) for ours, theirs in names.items()}
    length = keys.metadata.get(f"{keys.architecture}.context_length")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in found.items() if token is not None},
        **({"model_max_length": length} if isinstance(length, int) else {}),
        "clean_up_tokenization_spaces": False,
    }


def _generation_config(keys: _Keys) -> dict[str, Any]:
    stops = list(dict.fromkeys(i for i in (keys.id("eos"), keys.id("eot")) if i is not None))
    found = {
        "bos_token_id": keys.id("bos"),
        "eos_token_id": stops[0] if len(stops) == 1 else (stops or None),
        "pad_token_id": keys.id("padding"),
    }
    return {name: value for name, value in found.items() if value is not None}
