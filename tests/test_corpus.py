"""Texts, windows and overlap: exact counts, seeds that mean something, refusals that say what would work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitmill.calibrate import sample
from bitmill.calibrate.corpus import (
    EVALUATION_KINDS,
    Text,
    default_calibration,
    default_evaluation,
    load_text,
    load_texts,
)
from bitmill.calibrate.windows import overlap, sketch, start_token, token_ids, tokens_sha256, windows
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.errors import Refused
from tests.tiny import make_model, tokenizer


def words(name: str, count: int, weight: float = 1.0) -> Text:
    return Text("text", name, (" ".join(f"{name}{i}" for i in range(count)),), weight=weight)


def test_windows_are_the_text_and_nothing_else() -> None:
    text = words("a", 600)
    ids = token_ids(tokenizer(), text, chat=False)
    made = windows(tokenizer(), [text], 32, 4, seed=None)
    assert torch.equal(made.tokens, ids[:128].view(4, 32))
    assert made.facts["tokens"] == 128 and made.facts["sources"][0]["tokens_available"] == len(ids)


def test_seeds_choose_windows_and_the_hash_follows() -> None:
    text = words("a", 2000)
    first, again, other = (windows(tokenizer(), [text], 32, 8, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and first.facts == again.facts
    assert not torch.equal(first.tokens, other.tokens)
    assert first.facts["sha256"] == tokens_sha256(first.tokens) != other.facts["sha256"]
    assert len({tuple(row) for row in first.tokens.tolist()}) == 8


def test_mixtures_follow_weights_and_short_texts_are_made_up_for() -> None:
    long, other, short = words("a", 3000, 2.0), words("b", 3000, 1.0), words("c", 20, 5.0)
    even = windows(tokenizer(), [long, other], 32, 9, seed=0)
    assert [s["windows"] for s in even.facts["sources"]] == [6, 3]
    assert even.origin == (0,) * 6 + (1,) * 3
    mixed = windows(tokenizer(), [long, other, short], 32, 12, seed=0)
    have = mixed.facts["sources"][2]["tokens_available"] // 32
    shares = [s["windows"] for s in mixed.facts["sources"]]
    assert shares[2] == have < 7 and sum(shares) == 12 and not mixed.notes


def test_too_little_text_is_a_note_and_none_is_refused() -> None:
    made = windows(tokenizer(), [words("a", 40)], 32, 1000, seed=0)
    assert 0 < made.facts["windows"] < 1000 and made.notes[0].kind == "short-text"
    with pytest.raises(Refused, match=r"not one window of 512 tokens \(a: \d+ tokens\)"):
        windows(tokenizer(), [words("a", 5)], 512, 4, seed=0)
    with pytest.raises(Refused, match="nothing to predict"):
        windows(tokenizer(), [words("a", 5)], 1, 4, seed=0)


def test_begin_of_text_only_where_the_tokenizer_puts_one() -> None:
    assert start_token(tokenizer()) is None


def test_chat_goes_through_the_template() -> None:
    spoken = Text("chat", "c", conversations=(({"role": "user", "content": "hi"},),) * 9)
    made = windows(tokenizer(), [spoken], 8, 2, seed=None)
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer().decode(token_ids(tokenizer(), spoken, chat=False))
    assert made.tokens[0, 0] == tokenizer().convert_tokens_to_ids("<|im_start|>")
    plain = Text("text", "p", ("Why?\n\nBecause.",))
    said = tokenizer().decode(token_ids(tokenizer(), plain, chat=True))
    assert said == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"


def test_overlap_finds_what_was_seen() -> None:
    g = torch.Generator().manual_seed(0)
    seen, fresh = torch.randint(0, 400, (32, 512), generator=g), torch.randint(0, 400, (8, 512), generator=g)
    assert overlap(sketch(seen), seen[:4]) == 1.0
    assert overlap(sketch(seen), fresh) == 0.0
    half = torch.cat([seen[:8, :256], fresh[:, 256:]], 1)
    assert overlap(sketch(seen), half) == pytest.approx(0.49, abs=0.1)
    assert overlap(sketch(seen), fresh[:, :8]) is None


def test_defaults_share_no_document_and_hardly_a_phrase() -> None:
    calibration, evaluation = default_calibration(None), default_evaluation()
    assert tuple(t.kind for t in evaluation) == EVALUATION_KINDS
    used = {d for text in calibration for d in text.documents}
    assert not used & {d for text in evaluation for d in text.documents}
    seen = windows(tokenizer(), calibration, 512, 256, seed=0).facts["shingles"]
    for text in evaluation:
        held = windows(tokenizer(), [text], 512, 24, seed=None)
        share = overlap(seen, held.tokens)
        assert share is not None and share < 0.05, text.kind


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffplain", encoding="utf-8")
    assert load_text(str(tmp_path / "a.txt")).documents == ("plain",)
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_text(f"{tmp_path / 'b.jsonl'}=2").weight == 2.0
    assert load_text(str(tmp_path / "b.jsonl")).documents == ("one", "two")
    chat = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat), encoding="utf-8")
    read = load_text(str(tmp_path / "c.jsonl"))
    assert read.kind == "chat" and [m["role"] for m in read.conversations[0]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b" \n", "empty"),
        ("latin.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("nul.txt", b"a\0b", "NUL"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', "not a line of JSON"),
        ("odd.jsonl", b'{"body": "a"}', 'neither "text" nor "messages"'),
        ("odd2.jsonl", b'{"messages": [{"role": "user"}]}', "role"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=said):
        load_text(str(tmp_path / name))


def test_names_that_are_nothing_are_refused(tmp_path: Path) -> None:
    for name in ("nowhere.txt", str(tmp_path), "docs=0", "docs=nan"):
        with pytest.raises(Refused):
            load_text(name)
    with pytest.raises(Refused, match="no text was named"):
        load_texts([])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    return SafetensorsFolder(make_model(tmp_path_factory.mktemp("sampled") / "tiny"))


def test_sampled_text_is_the_models_own_seeded_and_kept(tiny: SafetensorsFolder, tmp_path: Path) -> None:
    said: list[int] = []
    first = sample.sample_text(
        tiny, tokens=1000, seed=1, cache=tmp_path, progress=lambda _, done, total, __: said.append(done)
    )
    assert len(first.documents) == 4 and said[-1] == 1024 and said == sorted(said)
    assert sum(d.startswith("<|im_start|>user\n") for d in first.documents) == 1
    assert sum(d.startswith("<|endoftext|>") for d in first.documents) == 3
    kept = next(tmp_path.glob("*.json"))
    stamp = kept.stat().st_mtime_ns
    assert sample.sample_text(tiny, tokens=1000, seed=1, cache=tmp_path).sha256 == first.sha256
    assert kept.stat().st_mtime_ns == stamp
    kept.write_text(kept.read_text(encoding="utf-8").replace("a", "b", 50), encoding="utf-8")
    assert sample.sample_text(tiny, tokens=1000, seed=1, cache=tmp_path).sha256 == first.sha256
    assert sample.sample_text(tiny, tokens=1000, seed=2, cache=tmp_path).sha256 != first.sha256


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).repeat(20_000, 1)
    drawn = sample._drawn(logits, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    assert torch.allclose(found, torch.softmax(logits[0], 0), atol=0.015) and found[3] == 0


def test_a_model_too_large_to_sample_is_refused(
    tiny: SafetensorsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "CPU_WORK", 1.0)
    with pytest.raises(Refused, match="takes hours"):
        sample.sample_text(tiny, cache=tmp_path)
