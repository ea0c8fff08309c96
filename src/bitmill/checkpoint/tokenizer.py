"""A checkpoint's tokenizer: loaded from the files it carries, without network and without its author's code,
and compared with another one token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from bitmill.checkpoint.chat_template import scan
from bitmill.checkpoint.tokenizer_keys import backend, gguf_keys, parsed
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, Refused

__all__ = [
    "NASTY",
    "chat_parity",
    "gguf_keys",
    "load_tokenizer",
    "parity",
    "render_chat",
    "token_parity",
    "tokenizer_from",
]

_LONGEST_CHAT = 16 << 20
_TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a program of template expressions can end in."""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

NASTY: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "   two  spaces   and more    ",
    "\n",
    "\n\n\n\ttabs\t\tand\r\nreturns\r",
    "Hello, world! It's we'll I'VE they'd DON'T",
    "0 12 345 6789 1234567890 3.14159 1e-10 0xFF ½ ² ٣ 四",
    "def f(x):\n    return {k: v for k, v in x.items() if k != '__doc__'}  # ok\n",
    '<html><body class="a b">&nbsp;</body></html> <s> </s> [INST] <0x41>',
    "中文分词 日本語テキスト 한국어 ภาษาไทย",
    "العربية מימין לשמאל \u202eoverride\u202c",
    "e\u0301 vs é, n\u0303, a\u0308\u0323, Z\u0351\u036b\u0343\u036a\u0302",
    "zero\u200bwidth\u200d\u2060joiner\ufeff\u00ad\u00a0nbsp\u3000ideographic",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ☃️ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
    "ﬁ ligature İstanbul ẞ ſ Ω Å ǅ",
    "\x00\x01\x7f\x80\u0085\u2028\u2029",
    "SPACE\u2581MARK Ġ Ċ ċ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa----------------========",
    "https://example.org/path?q=a%20b&c=d#frag C:\\dir\\file.txt ~/.rc",
)
"""Texts that tokenizers are known to disagree about."""

_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi  there\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    [
        {"role": "user", "content": "é 🙂"},
        {"role": "assistant", "content": "{{ 7 * 7 }}"},
        {"role": "user", "content": " again "},
    ],
)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer.

    Raises:
        Refused: it carries none.
        BadFile: its files cannot be read.
    """
    return tokenizer_from(checkpoint.carried, str(checkpoint.path))


def tokenizer_from(files: Mapping[str, bytes], where: str) -> PreTrainedTokenizerFast:
    """The tokenizer described by ``tokenizer.json`` and the files beside it; see :func:`load_tokenizer`."""
    if "tokenizer.json" not in files:
        raise Refused(
            "the model carries no tokenizer.json",
            where=where,
            fix="save it once with transformers' AutoTokenizer(...).save_pretrained(folder)",
        )
    options = parsed(files, "tokenizer_config.json")
    named = {name: _token(options[name]) for name in _NAMED if options.get(name)}
    length = options.get("model_max_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(files["tokenizer.json"]),
        clean_up_tokenization_spaces=bool(options.get("clean_up_tokenization_spaces", False)),
        **({"model_max_length": int(length)} if isinstance(length, (int, float)) else {}),
        **named,
    )
    template = files.get("chat_template.jinja", b"").decode("utf-8", errors="replace")
    named_template = options.get("chat_template")
    template = template or (named_template if isinstance(named_template, str) else "")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def _token(value: Any) -> str | AddedToken:
    if isinstance(value, dict):
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        return AddedToken(
            str(value.get("content", "")), special=True, **{f: bool(value.get(f)) for f in flags}
        )
    return str(value)


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text a model sees for these messages.

    The template is a program from the model's file. It is run only where its syntax shows nothing that no
    honest template does (:mod:`~bitmill.checkpoint.chat_template`), and in jinja2's immutable sandbox, which
    transformers uses: no attributes that lead to Python's internals, no changes to what it is given, loops
    over at most 100 000 numbers. Nested loops and long multiplications still cost what they cost: render
    templates of strangers in a process of their own, as :mod:`bitmill.trust` does.

    Raises:
        Refused: the tokenizer has no template.
        BadFile: the template does what none should, fails, or makes an absurdly long text.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        raise Refused("the model has no chat template", fix="send it plain text instead of messages")
    refused = next((remark for remark in scan(template) if remark.grave), None)
    if refused is not None:
        raise BadFile(f"the chat template is not rendered: {refused.what}", where=f"line {refused.line}")
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except _TEMPLATE_FAULTS as error:
        raise BadFile(f"the chat template fails: {error}") from error
    if not isinstance(text, str) or len(text) > _LONGEST_CHAT:
        raise BadFile(
            f"the chat template makes more than {_LONGEST_CHAT} characters of {len(messages)} messages"
        )
    return text


def parity(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast, texts: Sequence[str] = NASTY) -> list[str]:
    """Every difference found between two tokenizers, one sentence each; empty when they are interchangeable.

    Compares what :func:`token_parity` and :func:`chat_parity` compare.
    """
    return token_parity(a, b, texts) + chat_parity(a, b)


def token_parity(
    a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast, texts: Sequence[str] = NASTY
) -> list[str]:
    """Differences in vocabularies, added tokens, special ids, the ids of ``texts`` and of every added token
    inside a sentence, and in what those ids decode to."""
    found: list[str] = []
    if a.get_vocab() != b.get_vocab():
        apart = a.get_vocab().items() ^ b.get_vocab().items()
        found.append(f"vocabularies differ in {len(apart)} entries, for example {min(apart)!r}")
    marked = [{i: (t.content, t.special) for i, t in x.added_tokens_decoder.items()} for x in (a, b)]
    if marked[0] != marked[1]:
        apart_added = sorted(marked[0].items() ^ marked[1].items())
        found.append(f"added tokens differ, for example {apart_added[0]!r}")
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            found.append(f"{name} is {ours} and {theirs}")
    inside = [f"x {content} y{content}{content}\n" for content, _ in marked[0].values()]
    for text in (*texts, *inside):
        for special in (True, False):
            ours, theirs = (x(text, add_special_tokens=special)["input_ids"] for x in (a, b))
            if ours != theirs:
                found.append(f"ids of {text[:40]!r} differ: {ours[:12]} and {theirs[:12]}")
                break
            if a.decode(ours) != b.decode(theirs):
                found.append(f"the ids of {text[:40]!r} decode to other text")
                break
    return found


def chat_parity(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> list[str]:
    """Differences between the chats that two tokenizers render."""
    if bool(a.chat_template) != bool(b.chat_template):
        return ["only one of them has a chat template"]
    if not a.chat_template:
        return []
    return [
        f"chat {i} renders differently"
        for i, chat in enumerate(_CHATS)
        if _rendered(a, chat) != _rendered(b, chat)
    ]


def _rendered(tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, str]]) -> str:
    try:
        return render_chat(tokenizer, chat)
    except BadFile as error:  # a template may refuse a conversation, a system message for example
        return f"refused: {error.what}"
