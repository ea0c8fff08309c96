"""Tokenizers through GGUF and back: the same tokens, ids and chats, or a refusal."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.gguf_write import encoded, head
from bitmill.checkpoint.tokenizer import NASTY, gguf_keys, load_tokenizer, parity, render_chat, tokenizer_from
from bitmill.checkpoint.tokenizer_gguf import WORDS, files_of
from bitmill.core.errors import BadFile, BadRecipe, Refused
from bitmill.mill import quantize
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_source
from tests.test_gguf import carried_model
from tests.tiny import make_model, tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


def through_gguf(
    carried: Mapping[str, bytes], config: Mapping[str, Any], folder: Path
) -> Mapping[str, bytes]:
    """The tokenizer's files after a trip through a real GGUF file's keys."""
    keys = {"general.architecture": "llama", "llama.context_length": 8192, **gguf_keys(carried, config)}
    (folder / "keys.gguf").write_bytes(head({k: encoded(v) for k, v in keys.items()}, [])[0])
    return files_of(GgufFile(folder / "keys.gguf").metadata, "keys.gguf")


def corpus() -> list[str]:
    """Without the null character: llama.cpp ends strings there, so that no token of its own can hold one."""
    return [text.replace("\0", "") for text in (Path(__file__).read_text(encoding="utf-8"), *NASTY)] * 3


@functools.cache
def byte_level(words: str, added: bool = True) -> Mapping[str, bytes]:
    """A small BPE whose text is cut the way ``words`` names."""
    known = next(w for w in WORDS if w.name == words)
    steps: list[Any] = []
    for pattern in known.patterns:
        if pattern == r"\p{N}":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif pattern != "gpt2":
            steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=known.patterns[-1] == "gpt2"))
    bpe = Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    bpe.decoder = decoders.ByteLevel()
    if known.normalizer:
        bpe.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus(), trainer)
    if added:
        bpe.add_tokens([AddedToken("<think>", normalized=False)])
    if known.adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 1)]
        )
    options = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}, "pad_token": "<|end|>"}
    return {"tokenizer.json": bpe.to_str().encode(), "tokenizer_config.json": json.dumps(options).encode()}


@functools.cache
def sentencepiece(prefix: bool) -> Mapping[str, bytes]:
    """A small BPE with byte fallback, as Llama 2 (``prefix``) and Gemma have."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Replace(" ", "\u2581")]
    if prefix:
        steps.insert(0, normalizers.Prepend("\u2581"))
    bpe.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special[:3], show_progress=False, max_token_length=8
    )
    bpe.train_from_iterator((line for text in corpus() for line in text.split(" ")), trainer)
    made = json.loads(bpe.to_str())
    vocabulary = made["model"]["vocab"]
    for piece in special[3:]:
        vocabulary[piece] = len(vocabulary)
    after: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    again = Tokenizer.from_str(json.dumps(made))
    again.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    again.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer.json": again.to_str().encode(), "tokenizer_config.json": json.dumps(options).encode()}


def test_embedded_keys_come_back_as_they_were() -> None:
    model = carried_model()
    keys = gguf_keys(model.carried, model.config)
    theirs = {k: v for k, v in model.metadata.items() if k.startswith("tokenizer.")}
    assert {k: keys[k] for k in theirs} == theirs
    assert set(keys) - set(theirs) == {"tokenizer.ggml.add_eos_token"}


def test_embedded_source_export_and_reexport_agree(tmp_path: Path) -> None:
    model = carried_model()
    source = load_tokenizer(model)
    for name, data in model.carried.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(dict(model.config)))
    exported = AutoTokenizer.from_pretrained(tmp_path)
    again = tokenizer_from(through_gguf(model.carried, model.config, tmp_path), "again")
    assert parity(source, exported) == []
    assert parity(source, again) == []
    assert len(source.added_tokens_decoder) == 17


def test_embedded_text_is_cut_as_the_model_was_trained() -> None:
    tokenizer = load_tokenizer(carried_model())
    assert [tokenizer.decode(i) for i in tokenizer("in 12345 days")["input_ids"]] == [
        *["in", " ", "1", "2", "3", "4", "5", " days"]
    ]
    assert tokenizer("<|im_end|>\n")["input_ids"] == [2, 198]
    assert tokenizer.decode(tokenizer("Hello , world !")["input_ids"]) == "Hello , world !"
    assert render_chat(tokenizer, HELLO).endswith(
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("words", [w.name for w in WORDS])
def test_every_way_of_cutting_words_survives(words: str, tmp_path: Path) -> None:
    carried = byte_level(words)
    keys = gguf_keys(carried, {})
    assert keys["tokenizer.ggml.pre"] == words
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.token_type"][-1] == 4
    assert keys["tokenizer.ggml.bos_token_id"] == 1
    assert (
        parity(tokenizer_from(carried, "a"), tokenizer_from(through_gguf(carried, {}, tmp_path), "b")) == []
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_survives(prefix: bool, tmp_path: Path) -> None:
    carried = sentencepiece(prefix)
    keys = gguf_keys(carried, {})
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 1]
    assert keys["tokenizer.ggml.token_type"].count(6) == 256
    assert (
        parity(tokenizer_from(carried, "a"), tokenizer_from(through_gguf(carried, {}, tmp_path), "b")) == []
    )


def test_rows_without_a_token_get_placeholders(tmp_path: Path) -> None:
    carried = byte_level("smollm")
    size = len(tokenizer_from(carried, "a"))
    keys = gguf_keys(carried, {"vocab_size": size + 3})
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{size + 2}]"
    assert keys["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    again = tokenizer_from(through_gguf(carried, {"vocab_size": size + 3}, tmp_path), "b")
    assert parity(tokenizer_from(carried, "a"), again) == []


def test_parity_sees_differences() -> None:
    smol, gpt2 = (tokenizer_from(byte_level(name), name) for name in ("smollm", "gpt-2"))
    assert parity(smol, smol) == []
    assert any("ids of" in line or "vocabularies" in line for line in parity(smol, gpt2))
    with_extra = tokenizer_from(byte_level("smollm", added=False), "x")
    assert any("added tokens" in line for line in parity(smol, with_extra))
    with_extra.chat_template = "x"
    assert any("chat template" in line for line in parity(smol, with_extra))
    other = tokenizer_from({**byte_level("smollm"), "tokenizer_config.json": b"{}"}, "y")
    assert any("bos_token_id" in line for line in parity(smol, other))


def test_what_llama_cpp_cannot_do_is_refused() -> None:
    carried = byte_level("gpt-2")
    whole = json.loads(carried["tokenizer.json"])
    for change, reason in (
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "other words"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
            "other words",
        ),
    ):
        text = json.dumps({**whole, **change}).encode()
        with pytest.raises(Refused, match=reason) as caught:
            gguf_keys({"tokenizer.json": text}, {})
        assert caught.value.fix
    with pytest.raises(Refused, match="no tokenizer.json"):
        gguf_keys({"tokenizer.model": b""}, {})
    assert gguf_keys({}, {}) == {}


def other_words(pattern: str) -> Mapping[str, bytes]:
    """The tokenizer of ``byte_level("gpt-2")`` with another pattern before its bytes."""
    carried = byte_level("gpt-2")
    whole = json.loads(carried["tokenizer.json"])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}
    return {**carried, "tokenizer.json": json.dumps(whole).encode()}


def test_a_pre_tokenizer_is_known_by_what_it_does() -> None:
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert gguf_keys(other_words(gpt2), {})["tokenizer.ggml.pre"] == "gpt-2"
    with pytest.raises(Refused, match="other words") as caught:
        gguf_keys(other_words(gpt2.replace(r"\p{N}+", r"\p{N}{1,2}")), {})
    assert "--pre-tokenizer NAME" in str(caught.value.fix)


def test_an_unknown_pre_tokenizer_can_be_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    text = json.loads((folder / "tokenizer.json").read_text())
    text["pre_tokenizer"] = json.loads(other_words(r"\p{L}\p{N}|\s")["tokenizer.json"])["pre_tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps(text))
    source = open_source(str(folder))
    with pytest.raises(Refused, match="other words"):
        plan(parse("f16"), source)
    made = [plan(parse(f"f16, pre-tokenizer={name} > gguf"), source) for name in ("mine-1.5", "qwen2")]
    assert made[0].digest != made[1].digest and "pre-tokenizer=mine-1.5" in made[0].identity()["recipe"]
    quantize(source, made[0].recipe, tmp_path / "out.gguf")
    assert GgufFile(tmp_path / "out.gguf").metadata["tokenizer.ggml.pre"] == "mine-1.5"
    again = open_source(str(tmp_path / "out.gguf"))
    quantize(again, "q8_0, pre-tokenizer=smollm > gguf", tmp_path / "again.gguf")
    assert GgufFile(tmp_path / "again.gguf").metadata["tokenizer.ggml.pre"] == "smollm"
    assert parity(load_tokenizer(open_source(str(tmp_path / "again.gguf"))), tokenizer()) == []


@pytest.mark.parametrize("text", ["f16, pre-tokenizer=a/b > gguf", "f16, pre-tokenizer=x > bitmill"])
def test_names_that_cannot_be(text: str) -> None:
    with pytest.raises(BadRecipe, match="pre-tokenizer"):
        parse(text)


def test_keys_that_contradict_each_other_are_bad(tmp_path: Path) -> None:
    good = {"general.architecture": "llama", **gguf_keys(byte_level("smollm"), {})}
    for change, reason in (
        ({"token_type": [1]}, "types"),
        ({"tokens": [1, 2]}, "list of str"),
        ({"eos_token_id": 10**6}, "eos_token_id"),
        ({"merges": ["nothing"]}, "merge"),
        ({"merges": ["never seen"]}, "merge"),
    ):
        keys = {**good, **{f"tokenizer.ggml.{k}": v for k, v in change.items()}}
        with pytest.raises(BadFile, match=reason):
            files_of(keys, "x.gguf")
    for change, reason in (({"pre": "martian"}, "martian"), ({"model": "rwkv"}, "rwkv")):
        with pytest.raises(Refused, match=reason):
            files_of({**good, **{f"tokenizer.ggml.{k}": v for k, v in change.items()}}, "x.gguf")
    assert files_of({"general.architecture": "llama"}, "x.gguf") == {}


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set _ = messages.append(1) %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages[9].content.nothing }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ 1 // 0 }}",
        "x" * (300 << 10),
        "{{ 'x' * (20 * 1024 * 1024) }}",
    ],
)
def test_templates_that_misbehave_are_stopped(template: str) -> None:
    tokenizer = tokenizer_from({**byte_level("gpt-2"), "chat_template.jinja": template.encode()}, "x")
    with pytest.raises(BadFile, match="chat template"):
        render_chat(tokenizer, HELLO)


def test_a_tokenizer_without_template_says_so() -> None:
    with pytest.raises(Refused, match="no chat template"):
        render_chat(tokenizer_from(byte_level("gpt-2"), "x"), HELLO)


def test_files_that_are_not_tokenizers_are_bad() -> None:
    for raw in (b"", b"[]", b"{", b'{"model": 1}', b"\xff", b'{"a": 1, "a": 2}'):
        with pytest.raises(BadFile):
            tokenizer_from({"tokenizer.json": raw}, "x")
    with pytest.raises(Refused):
        tokenizer_from({}, "x")


def test_loading_needs_nothing_but_the_carried_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("opened a connection")

    monkeypatch.setattr("socket.socket.connect", nothing)
    assert isinstance(carried_model(), GgufCheckpoint)
    assert len(load_tokenizer(carried_model())) == 49152
