"""Adapters: derivatives through frozen grids, what is learned from, resume to the byte, peft, merging."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitmill import mill
from bitmill.adapters.adapter import read_adapter
from bitmill.adapters.base import base_rows, frozen
from bitmill.adapters.finetune import finetune
from bitmill.adapters.frozen import FrozenLinear, narrowed, packed
from bitmill.adapters.merge import Merged
from bitmill.core.errors import BadFile, Interrupted, Refused, Unsolvable
from bitmill.core.registry import parse_grid
from bitmill.source import open_source
from bitmill.training.lessons import Lesson, read_lessons
from bitmill.training.optimizers import optimizer_for, restore, state_of
from bitmill.training.settings import Settings
from tests.cli.command import Command
from tests.tiny import make_model, tokenizer, tokens

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
GRIDS = ("nf4-b64-dq", "nf4-b64", "int4-g64-asym", "int3-g32-sym", "int8-channel-sym", "mxfp4", "nvfp4",
         "q4_0", "q8_0", "fp8-e4m3-channel", "bf16")  # fmt: skip
QUICK = Settings(steps=10, lr=5e-3, batch=4, context=64, micro_tokens=128)
RANK: dict[str, Any] = {"rank": 4, "alpha": 8}


def talk(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), **SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "talk.jsonl"
    rows = [talk(f"color {n}", "red red red" if n % 2 else "blue blue") for n in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def adapter(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "out"
    report = finetune(str(model), data, out, settings=QUICK, **RANK)
    facts = report.tuning
    assert facts["least"] < 0.8 * facts["first"] and 0 < facts["best_step"] <= 10
    assert [step for step, *_ in facts["trace"]] == list(range(11))
    return out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def _linear(text: str, bias: bool = False) -> tuple[FrozenLinear, Tensor, Tensor | None]:
    rng = torch.Generator().manual_seed(0)
    quantized = parse_grid(text).round(0.1 * torch.randn(48, 128, generator=rng))
    b = torch.randn(48, generator=rng) if bias else None
    return FrozenLinear(quantized, b, torch.float32, CPU), quantized.dense(), b


@pytest.mark.parametrize("text", GRIDS)
def test_a_frozen_linear_is_the_dense_one_both_ways(text: str) -> None:
    layer, dense, bias = _linear(text, bias=True)
    assert torch.equal(layer.values(torch.float32), dense)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    other = x.detach().clone().requires_grad_()
    out, wanted = layer(x), torch.nn.functional.linear(other, dense, bias)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(pull)
    wanted.backward(pull)
    assert torch.equal(out, wanted) and x.grad is not None and other.grad is not None
    torch.testing.assert_close(x.grad, other.grad)
    assert all(p.grad is None for p in layer.parameters())


def test_nothing_dense_is_kept_for_the_way_back() -> None:
    layer, dense, _ = _linear("nf4-b64-dq")
    saved: list[int] = []

    def note(value: Tensor) -> Tensor:
        saved.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        layer(torch.randn(3, 128, requires_grad=True))
    assert dense.numel() not in saved
    assert layer.held_bytes * 8 < 4.4 * dense.numel(), "four bits a code, and scales of eight"
    assert _linear("int8-channel-sym")[0].held_bytes * 8 < 8.5 * dense.numel()


@pytest.mark.parametrize("most", [1, 3, 7, 15, 200])
def test_packed_codes_come_back(most: int) -> None:
    rng = torch.Generator().manual_seed(most)
    for columns in (1, 7, 64):
        codes = torch.randint(0, most + 1, (5, columns), generator=rng).to(torch.uint8)
        codes[0, 0] = most
        held = packed(codes)
        assert torch.equal(held.out(), codes)
        assert held.values.shape[1] == -(-columns // (8 // (held.bits or 8)))
    for values in (torch.tensor([1.5, -3.0]), torch.rand(4, generator=rng), torch.tensor([0.0, 15.0])):
        held = narrowed(values)
        assert torch.equal(held.out(), values) and held.out().dtype == values.dtype
    assert narrowed(torch.tensor([1.5, -3.0])).values.dtype is torch.float16


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def _said(lesson: Lesson) -> str:
    return tokenizer().decode(lesson.ids[lesson.counts])


def test_only_answers_count(tmp_path: Path) -> None:
    words = ["first", "second", "third"]
    messages = [{"role": "system", "content": "be brief"}]
    for word in words:
        messages += [{"role": "user", "content": f"ask {word}"}, {"role": "assistant", "content": word}]
    many = _write(tmp_path / "a.jsonl", {"messages": messages}, talk("é 🙂", "ü"))
    made = read_lessons(many, tokenizer(), 512, 0, many)
    assert [_said(lesson) for lesson in made.taught] == [
        "first<|im_end|>\nsecond<|im_end|>\nthird<|im_end|>\n",
        "ü<|im_end|>\n",
    ]
    assert made.facts["rows"] == {"messages": 2}
    other = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    mixed = _write(
        tmp_path / "b.jsonl",
        {"conversations": other},
        {"prompt": "2+2=", "completion": "4"},
        {"text": "free text"},
    )
    made = read_lessons(mixed, tokenizer(), 512, 0, mixed)
    assert [_said(lesson) for lesson in made.taught] == [
        "hello<|im_end|>\n",
        "4<|im_end|>",
        "free text<|im_end|>",
    ]


def test_templates_that_forget_give_an_example_for_each_answer(tmp_path: Path) -> None:
    """Qwen 3's leaves earlier thoughts out: a turn reads another way once it is not the last."""
    known = tokenizer()
    before = known.chat_template
    known.chat_template = before.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'cut' }}")
    rows = [*talk("one", "two")["messages"], *talk("three", "four")["messages"]]
    try:
        path = _write(tmp_path / "a.jsonl", {"messages": rows})
        made = read_lessons(path, known, 512, 0, path)
    finally:
        known.chat_template = before
    assert [_said(lesson) for lesson in made.taught] == ["two<|im_end|>\n", "four<|im_end|>\n"]


def test_windows_cuts_and_who_judges(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("some words and more of them. " * 60)
    made = read_lessons(text, tokenizer(), 32, 0)
    assert {len(lesson.ids) for lesson in made.taught[:-1]} == {32}
    total = len(made.taught) + len(made.judges)
    assert len(made.judges) == max(1, total // 10)
    again = read_lessons(text, tokenizer(), 32, 0)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(made.judges, again.judges, strict=True))
    seen = [id(lesson) for step in range(len(made.taught)) for lesson in made.batch(step, 3, 5)]
    assert all(seen.count(id(lesson)) == 3 for lesson in made.taught)
    late = _write(tmp_path / "late.jsonl", talk("q" * 200, "too late"), talk("q", "good"), talk("r", "fine"))
    made = read_lessons(late, tokenizer(), 40, 0)
    assert made.facts["left_out"] == 1 and made.facts["cut_to_context"] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no text"),
        ("{", "JSON"),
        ("[1]", "neither"),
        ('{"messages": [{"role": "user"}]}', "role"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nobody answers"),
        ('{"text": "alone"}', "judge"),
    ],
)
def test_bad_data_is_refused_with_its_line(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(Refused, match=said) as caught:
        read_lessons(path, tokenizer(), 64, 0)
    assert str(path) in str(caught.value.where)


def test_peft_loads_it_on_the_original_to_the_bit(adapter: Path, model: Path) -> None:
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "bitmill-report.json",
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    theirs = {n.replace(".default.", "."): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert theirs.keys() == stored.keys() and len(stored) == 2 * 7 * 2
    assert all(torch.equal(theirs[name], value) for name, value in stored.items())
    assert any(value.abs().max() > 0 for name, value in stored.items() if "lora_B" in name)


def test_what_learned_is_what_peft_computes(model: Path, data: Path, tmp_path: Path) -> None:
    """On a base that is not rounded, the held-out loss of the report is that of plain transformers + peft."""
    report = finetune(str(model), data, tmp_path / "out", settings=QUICK, **RANK, base_grid="f32")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out").eval()
    judges = read_lessons(data, tokenizer(), QUICK.context, QUICK.seed).judges
    total = 0.0
    for lesson in judges:
        labels = torch.where(lesson.counts, lesson.ids, -100)[None]
        with torch.no_grad():
            total += float(loaded(lesson.ids[None], labels=labels).loss) * lesson.answers
    assert total / sum(j.answers for j in judges) == pytest.approx(report.tuning["least"], rel=1e-4)


@pytest.mark.parametrize("stop", ["step 3: journaled", "step 7: live written", "adapter: journaled"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_writes_the_same_bytes(
    stop: str, optimizer: str, model: Path, data: Path, tmp_path: Path
) -> None:
    told = Settings(**{**vars(QUICK), "optimizer": optimizer})

    def boundary(event: str) -> None:
        if event == stop:
            raise KeyboardInterrupt

    whole = finetune(str(model), data, tmp_path / "whole", settings=told, **RANK)
    with pytest.raises(Interrupted):
        finetune(str(model), data, tmp_path / "parts", settings=told, **RANK, boundary=boundary)
    parts = finetune(str(model), data, tmp_path / "parts", settings=told, **RANK)
    assert parts.resumed and whole.tuning["trace"] == [tuple(t) for t in parts.tuning["trace"]]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with pytest.raises(Refused, match="exists"):
        finetune(str(model), data, tmp_path / "parts", settings=Settings(**{**vars(told), "lr": 1.0}), **RANK)


def test_states_of_eight_bits_come_back() -> None:
    made = []
    for again in (False, True):
        weight = torch.nn.Parameter(torch.ones(64, 128))
        optimizer, _ = optimizer_for([weight], "adamw8bit", 1e-2)
        for step in range(4):
            weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if again and step == 1:
                kept = state_of(optimizer)
                assert any(value.dtype is torch.uint8 for value in kept.values())
                optimizer, _ = optimizer_for([weight], "adamw8bit", 1e-2)
                restore(optimizer, kept)
        made.append(weight.detach())
    assert torch.equal(*made)


def test_divergence_stops_and_says_so(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "rate", lambda *_: 1e37)
    with pytest.raises(Unsolvable, match="learning (diverged|met a loss)") as caught:
        finetune(str(model), data, tmp_path / "out", settings=QUICK, **RANK)
    assert "--lr" in str(caught.value.fix)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_best_step_survives_a_late_divergence(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = Settings.rate
    monkeypatch.setattr(Settings, "rate", lambda s, step, n: calm(s, step, n) * (1 if step < 5 else 1e40))
    report = finetune(str(model), data, tmp_path / "out", settings=QUICK, **RANK)
    assert 0 < report.tuning["written_step"] <= 6 and report.tuning["stopped"]
    assert [note.kind for note in report.notes] == ["stopped"]
    assert all(
        torch.isfinite(v).all() for v in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    )


def test_what_a_file_has_stored_stays_the_base(model: Path, data: Path, tmp_path: Path) -> None:
    mill.quantize(str(model), "q4_0, embed=q8_0 > gguf", tmp_path / "q.gguf")
    source = open_source(str(tmp_path / "q.gguf"))
    rows = base_rows(source, None)
    assert {row.why for row in rows} == {"q4_0"}
    base = frozen(source, rows, torch.float32, CPU, lambda *_: None)
    layer = base.model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, FrozenLinear)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(layer.values(torch.float32), source.read(name).float())
    report = finetune(source, data, tmp_path / "out", settings=QUICK, **RANK)
    assert report.tuning["least"] < report.tuning["first"] and report.plan["base"] == {"q4_0 as stored": 14}
    with pytest.raises(Refused, match="quantized already"):
        base_rows(source, "nf4-b64-dq")
    merged = Merged(source, read_adapter(tmp_path / "out"))
    delta = read_adapter(tmp_path / "out").delta(name)
    assert delta is not None and torch.equal(merged.read(name), source.read(name).float() + delta)


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe", "gemma2", "phi3"])
def test_other_families_learn_and_load(family: str, data: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family, num_hidden_layers=2)
    report = finetune(
        str(model), data, tmp_path / "out", settings=QUICK, **RANK, base_grid="int8-channel-sym"
    )
    assert report.tuning["least"] < report.tuning["first"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out").eval()
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs = {n.replace(".default.", "."): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert theirs.keys() == stored.keys() and all(torch.equal(theirs[n], v) for n, v in stored.items())
    merged = Merged(open_source(str(model)), read_adapter(tmp_path / "out"))
    mill.quantize(merged, "f32 > safetensors", tmp_path / "merged")
    ids = tokens(2, 16)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        torch.testing.assert_close(ours, loaded(ids).logits, rtol=1e-3, atol=1e-3)


def test_merging_is_pefts_own_and_prices_what_is_rounded(
    adapter: Path, model: Path, tmp_path: Path, command: Command
) -> None:
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    theirs = loaded.merge_and_unload().state_dict()
    merged = Merged(open_source(str(model)), read_adapter(adapter))
    for name in merged.tensors:
        torch.testing.assert_close(merged.read(name).float(), theirs[name], rtol=1e-6, atol=1e-7)
    said = command("merge", model, adapter, "-o", tmp_path / "sixteen")
    assert said.code == 0 and "bytes in" in said.out
    sixteen = open_source(str(tmp_path / "sixteen"))
    assert all(torch.equal(sixteen.read(n), merged.read(n).to(torch.bfloat16)) for n in merged.tensors)
    text = tmp_path / "text.txt"
    text.write_text("red blue color " * 400)
    out = tmp_path / "q.gguf"
    told = ("--text", text, "--json")
    said = command("merge", model, adapter, "q4_0, embed=q8_0 > gguf", "-o", out, *told)
    assert said.code == 0, said.err
    assert said.json["measurement"]["kld"]["mean"] > 0
    again = Merged(open_source(str(model)), read_adapter(adapter), "nf4-b64-dq")
    name = "model.layers.0.mlp.down_proj.weight"
    delta = read_adapter(adapter).delta(name)
    assert delta is not None
    rounded = parse_grid("nf4-b64-dq").round(open_source(str(model)).read(name)).dense()
    assert torch.equal(again.read(name), rounded + delta)


def test_adapters_that_cannot_be_merged_are_refused(adapter: Path, model: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(weights))
    changes: list[tuple[dict[str, Any], dict[str, Tensor], type[Exception], str]] = [
        ({"use_dora": True}, weights, Refused, "DoRA"),
        ({"peft_type": "IA3"}, weights, Refused, "IA3"),
        ({"bias": "all"}, weights, Refused, "biases"),
        ({"modules_to_save": ["lm_head"]}, weights, Refused, "whole modules"),
        ({"r": 5}, weights, BadFile, "rank 5"),
        ({"lora_alpha": -1}, weights, BadFile, "rank or alpha"),
        ({"alpha_pattern": {"q_.*": 3}}, weights, Refused, "regular expression"),
        ({}, {k: v for k, v in weights.items() if k != first}, BadFile, "half of a LoRA pair"),
        ({}, {**weights, "odd": torch.ones(2, 2)}, Refused, "no part of a LoRA pair"),
    ]
    for at, (change, tensors, kind, said) in enumerate(changes):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(kind, match=said):
            read_adapter(folder)
    other = open_source(str(make_model(tmp_path / "other", num_hidden_layers=1)))
    with pytest.raises(Refused, match="in this model") as caught:
        Merged(other, read_adapter(adapter))
    assert str(model) in str(caught.value.fix)
    with pytest.raises(Refused, match="bitmill merge"):
        open_source(str(_with_config(adapter, tmp_path / "mixed")))


def _with_config(adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


def test_patterns_and_rank_stabilised_scales_are_pefts(model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    told = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 9}, use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model), told)
    theirs.save_pretrained(tmp_path / "adapter")
    merged = Merged(open_source(str(model)), read_adapter(tmp_path / "adapter"))
    wanted = theirs.merge_and_unload().state_dict()
    for name in merged.tensors:
        torch.testing.assert_close(merged.read(name).float(), wanted[name], rtol=1e-5, atol=1e-6)


def test_the_command_says_what_it_would_do_and_did(
    command: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    short = ("--data", data, "--context", 64, "--rank", 4, "--steps", 4, "--batch", 4)
    said = command("finetune", model, *short, "--dry-run", "--json")
    assert said.code == 0 and said.json["base"] == {"nf4-b64-dq": 14} and said.json["steps"] == 4
    assert said.json["learned_weights"] == sum(
        4 * sum(row.shape) for row in base_rows(open_source(str(model)), None)
    )
    said = command("finetune", model, *short, "-o", tmp_path / "out", "--lr", "0.005")
    assert said.code == 0 and "held out" in said.out and "learning 4/4" in said.err
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if "adapter" in f.name) == int(
        said.out.split("bytes")[0].split()[-1].replace(",", "")
    )
    for words, reason in (
        (("finetune", model, "-o", tmp_path / "x"), "--data"),
        (("finetune", model, *short), "-o"),
        (("finetune", model, *short, "-o", tmp_path / "x", "--optimizer", "sgd"), "auto, adamw"),
        (("finetune", model, *short, "-o", tmp_path / "x", "--base-grid", "nf4-b128"), "shorter blocks"),
        (("merge", model, tmp_path, "-o", tmp_path / "x"), "adapter_config.json"),
    ):
        said = command(*words)
        assert said.code == 2 and reason in said.err and not (tmp_path / "x").exists()


def test_without_peft_one_line_says_how(
    command: Command, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    said = command("finetune", model, "--data", data, "--dry-run")
    assert said.code == 2 and "pip install 'bitmill[finetune]'" in said.err
