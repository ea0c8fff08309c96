"""Memory of running a model: worked numbers, other tools' published errors, hostile keys, what would fit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitmill.advise.cache_types import cache_type, cache_types
from bitmill.advise.machine import Machine, here, machine
from bitmill.advise.memory import Model, Wanted, fit, memory, most_context
from bitmill.advise.models import as_it_is, planned
from bitmill.advise.runtimes import RUNTIMES, runtime_of
from bitmill.advise.shape import Kept, Shape
from bitmill.advise.shape_config import config_shape
from bitmill.advise.shape_gguf import gguf_shape
from bitmill.advise.weights import Weights
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.mill import quantize
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import embedded_model
from tests.test_gguf import EXTRA
from tests.tiny import CONFIGS, EXPERTS, make_model

GIB = 1 << 30
MIB = 1 << 20
LLAMA_CPP, TRANSFORMERS, VLLM = (RUNTIMES[name] for name in ("llama.cpp", "transformers", "vllm"))


def heads(layers: int, kv: int, width: int, **more: Any) -> dict[str, Any]:
    """A configuration of which only the cache matters."""
    return {
        "model_type": "llama", "num_hidden_layers": layers, "num_key_value_heads": kv, "head_dim": width,
        "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 1024, "vocab_size": 1000, **more,
    }  # fmt: skip


def mla(layers: int, query_heads: int) -> dict[str, Any]:
    return heads(
        layers, query_heads, 64, model_type="deepseek_v3", num_attention_heads=query_heads, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    )  # fmt: skip


LLAMA3_8B = heads(32, 8, 128)
LLAMA3_70B = heads(80, 8, 128, hidden_size=8192, num_attention_heads=64)
GEMMA3_27B = heads(
    62, 16, 128, model_type="gemma3_text", hidden_size=5376, sliding_window=1024, sliding_window_pattern=6
)
QWEN35_27B = heads(
    64, 4, 256, model_type="qwen3_5_text", hidden_size=5120, num_attention_heads=24, linear_key_head_dim=128,
    linear_num_key_heads=16, linear_value_head_dim=128, linear_num_value_heads=48, linear_conv_kernel_dim=4,
)  # fmt: skip
QWEN3_06B = heads(28, 8, 128, model_type="qwen3", hidden_size=1024, num_attention_heads=16)
GPT_OSS_120B = heads(
    36, 8, 64, model_type="gpt_oss", hidden_size=2880, num_attention_heads=64, sliding_window=128
)


def cache(config: Mapping[str, Any], context: int, kind: str = "f16", runtime: str = "transformers") -> int:
    """Bytes of keys and values, by configuration alone."""
    program = replace(RUNTIMES[runtime], latent=True)
    kinds = (cache_type(kind), cache_type(kind))
    return sum(program.cache_bytes(b, context, 1, kinds, False) for b in config_shape(config).blocks)


@pytest.mark.parametrize(("kind", "mib"), [("f16", 512), ("q8_0", 272), ("q5_1", 192), ("q4_0", 144)])
def test_llama3_8b_at_4096_tokens(kind: str, mib: int) -> None:
    assert cache(LLAMA3_8B, 4096, kind, "llama.cpp") == mib * MIB


def test_llama3_70b_takes_320_kib_a_token() -> None:
    assert config_shape(LLAMA3_70B).token_numbers * 2 == 327_680
    assert cache(LLAMA3_70B, 8192) == 5 * GIB // 2


@pytest.mark.parametrize(
    ("config", "context", "true", "said"),
    [
        (GEMMA3_27B, 131_072, 10.4, 81.4),  # the window, and a head's width that is not hidden / heads
        (QWEN35_27B, 262_144, 16.0, 53.3),  # 16 of 64 blocks attend; LM Studio's 75 GB instead of 47, too
        (mla(61, 128), 163_840, 10.7, 2.1),  # DeepSeek-V3.1
        (mla(61, 64), 262_144, 17.2, 6.7),  # Kimi-K2.5
        (QWEN3_06B, 40_960, 4.4, 2.2),  # a head's width again
    ],
)
def test_what_other_tools_said_wrongly(
    config: dict[str, Any], context: int, true: float, said: float
) -> None:
    ours = cache(config, context) / GIB
    assert round(ours, 1) == true and abs(ours - said) > 1


def test_blocks_with_a_window_count_until_it_is_full() -> None:
    """36,864 bytes a token had been said of gpt-oss-120b, whose windowed blocks were left out."""
    assert config_shape(GPT_OSS_120B).token_numbers * 2 == 73_728
    assert cache(GPT_OSS_120B, 128) == 128 * 73_728
    assert cache(GPT_OSS_120B, 4096) == 4096 * 36_864 + 128 * 36_864


def test_mla_is_large_where_every_head_gets_its_own() -> None:
    block = config_shape(mla(61, 128), latent=False).blocks[0]
    assert (block.keys, block.values) == (128 * 192, 128 * 128)


def test_states_of_recurrent_blocks_do_not_grow() -> None:
    shape = config_shape(QWEN35_27B)
    assert [b.states for b in shape.blocks[:4]] == [(3 * 10_240, 48 * 128 * 128)] * 3 + [()]
    assert sum(LLAMA_CPP.state_bytes(b, 1) for b in shape.blocks) == 48 * 4 * (3 * 10_240 + 48 * 128 * 128)


HYBRIDS: list[tuple[dict[str, Any], int, int]] = [
    ({"model_type": "jamba", "num_key_value_heads": 8}, 4, 28),
    ({"model_type": "falcon_h1", "num_key_value_heads": 2, "head_dim": 128}, 32, 32),
    ({"model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention", "conv"] * 8}, 8, 24),
    ({"model_type": "mamba", "state_size": 16}, 0, 32),
    ({"model_type": "mamba2", "num_heads": 64, "head_dim": 64, "state_size": 128}, 0, 32),
]


@pytest.mark.parametrize(("config", "attending", "recurrent"), HYBRIDS)
def test_hybrids_by_configuration(config: dict[str, Any], attending: int, recurrent: int) -> None:
    shape = config_shape({"num_hidden_layers": 32, "hidden_size": 2048, "vocab_size": 1000, **config})
    assert sum(b.keys > 0 for b in shape.blocks) == attending
    assert sum(bool(b.states) for b in shape.blocks) == recurrent


def test_only_some_blocks_keep_keys_of_their_own() -> None:
    shape = config_shape(heads(35, 2, 256, model_type="gemma3n_text", num_kv_shared_layers=15))
    assert [b.keys > 0 for b in shape.blocks] == [True] * 20 + [False] * 15


def test_the_text_part_counts() -> None:
    assert config_shape({"model_type": "llava", "text_config": LLAMA3_8B}) == config_shape(LLAMA3_8B)


def test_a_model_nobody_knows_is_read_by_its_numbers() -> None:
    shape = config_shape(heads(2, 2, 64, model_type="never-heard-of", num_key_value_heads=[1, 4]))
    assert [b.keys for b in shape.blocks] == [64, 256]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (heads(0, 8, 128), "num_hidden_layers"),
        (heads(1 << 20, 8, 128, model_type="x"), "num_hidden_layers"),
        (heads(2, 8, 128, model_type="x", num_key_value_heads=[8]), "num_key_value_heads"),
        (heads(2, 8, 128, model_type="x", num_key_value_heads="8"), "num_key_value_heads"),
        (heads(2, 8, 128, model_type="x", layer_types=["recurrent", "telepathy"]), "recurrent"),
        (heads(2, 8, 128, model_type="x", layer_types=["telepathy"]), "telepathy"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], said: str) -> None:
    with pytest.raises((BadFile, Refused), match=said):
        config_shape(config)


def keys(arch: str = "llama", **more: Any) -> dict[str, Any]:
    """GGUF keys of eight small blocks."""
    numbers = {
        "block_count": 8, "embedding_length": 512, "feed_forward_length": 768, "vocab_size": 1000,
        "context_length": 4096, "attention.head_count": 8, "attention.head_count_kv": 2,
        "attention.sliding_window": 100, **more,
    }  # fmt: skip
    return {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in numbers.items() if v is not None}}


def windows(metadata: dict[str, Any]) -> list[int | None]:
    return [block.window for block in gguf_shape(metadata, "x").blocks]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (keys("llama"), [None] * 8),
        (keys("phi3"), [None] * 8),
        (keys("gemma2", **{"attention.sliding_window": None}), [4096, None] * 4),
        (keys("gemma3"), [100] * 5 + [None, 100, 100]),
        (keys("gemma3", **{"attention.sliding_window": 0}), [None] * 8),
        (keys("smallthinker"), [None, 4096, 4096, 4096] * 2),
        (keys("exaone4"), [None] * 8),
        (keys("gpt-oss", **{"attention.sliding_window_pattern": [True] + [False] * 7}), [100] + [None] * 7),
    ],
)
def test_windows_are_the_architectures(metadata: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(metadata) == expected


def test_heads_that_differ_from_block_to_block() -> None:
    several = [1, 2, 4, 8, 0, 8, 2, 1]
    shape = gguf_shape(keys("deci", **{"attention.head_count_kv": several}), "x")
    assert [b.keys for b in shape.blocks] == [64 * n for n in several]


def test_blocks_that_only_predict_further_keep_nothing() -> None:
    shape = gguf_shape(keys("glm4moe", nextn_predict_layers=1), "x")
    assert [b.keys for b in shape.blocks] == [128] * 7 + [0]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "general.architecture"),
        (keys(block_count=None), "block_count"),
        (keys(block_count=0), "0 blocks"),
        (keys(block_count=1 << 30), "blocks are announced"),
        (keys(block_count=-1), "block_count"),
        (keys(embedding_length="wide"), "embedding_length"),
        (keys(**{"attention.head_count_kv": [1, 2]}), "2 entries for 8 blocks"),
        (keys(**{"attention.head_count_kv": [1.5] * 8}), "head_count_kv"),
        (keys("glm4moe", nextn_predict_layers=9), "9 of 8 blocks"),
        (keys("mamba"), "ssm"),
        (keys("deepseek4"), "deepseek4"),
    ],
)
def test_hostile_keys(metadata: dict[str, Any], said: str) -> None:
    with pytest.raises((BadFile, Refused), match=said):
        gguf_shape(metadata, "x")


ODD: list[Any] = [None, -1, 0, 1, 1 << 31, 1.5, float("nan"), "x", [], [1], [None] * 8, {}, True]


def test_numbers_that_make_no_sense_are_refused_or_read() -> None:
    """Never another error than a refusal, and nothing is allocated for what they claim."""
    draw = random.Random(0)
    configs = [LLAMA3_8B, GEMMA3_27B, QWEN35_27B, mla(4, 8), GPT_OSS_120B, *(c for c, _, _ in HYBRIDS)]
    files = [keys(), keys("gemma3"), keys("jamba", **{"ssm.conv_kernel": 4, "ssm.inner_size": 64})]
    refused = 0
    for _ in range(400):
        facts = dict(draw.choice([*configs, *files]))
        facts[draw.choice(list(facts))] = draw.choice(ODD)
        try:
            in_file = "general.architecture" in facts
            shape = gguf_shape(facts, "x") if in_file else config_shape(facts)
            memory(Model(shape, Weights(0), LLAMA_CPP), Wanted(512, 1, cache_types("f16")))
        except (BadFile, Refused):
            refused += 1
    assert 100 < refused < 400


def test_a_window_holds_a_step_beside_it() -> None:
    assert LLAMA_CPP.cells(5000, None) == 5120
    assert LLAMA_CPP.cells(5000, 100) == 768
    assert LLAMA_CPP.cells(300, 100) == 512
    assert LLAMA_CPP.cells(5000, 100, full=True) == 5120
    assert VLLM.cells(17, None) == 32 and TRANSFORMERS.cells(17, 5) == 5


@pytest.mark.parametrize(
    ("name", "bits"),
    [("f32", 32), ("auto", 16), ("q5_0", 5.5), ("q4_1", 5), ("iq4_nl", 4.5), ("FP8_E4M3", 8), ("nvfp4", 4.5),
     ("int8", 8.5), ("int4", 4.5), ("int3", 3.5), ("int2", 2.5), ("int2-g32", 3), ("int4-g128", 4.25)],
)  # fmt: skip
def test_bits_of_a_number(name: str, bits: float) -> None:
    assert cache_type(name).bits == bits


@pytest.mark.parametrize("name", ["", "q9", "int9", "int4-g0", "int3-g1", "int4-g99999", "q8_0,q8_0,q8_0"])
def test_types_that_do_not_exist(name: str) -> None:
    with pytest.raises(Refused):
        cache_types(name)


def test_types_must_be_the_runtimes_and_divide_a_head() -> None:
    model = Model(gguf_shape(keys(**{"attention.key_length": 80}), "x"), Weights(0), LLAMA_CPP)
    memory(model, Wanted(512, 1, cache_types("f16")))
    with pytest.raises(Refused, match="head of 80"):
        memory(model, Wanted(512, 1, cache_types("q8_0,f16")))
    with pytest.raises(Refused, match="fp8"):
        memory(model, Wanted(512, 1, cache_types("fp8")))
    with pytest.raises(Refused, match="iq4_nl"):
        memory(replace(model, runtime=VLLM), Wanted(512, 1, cache_types("iq4_nl")))


@pytest.mark.parametrize(
    ("text", "ram", "vram"),
    [("8GB", 8 * 10**9, 0), ("vram=24GiB", 0, 24 * GIB), ("ram=16GB,vram=8GB", 16 * 10**9, 8 * 10**9),
     ("64g + VRAM=512M", 64 * 10**9, 512 * 10**6), ("1.5TB", 1_500_000_000_000, 0)],
)  # fmt: skip
def test_machines_in_words(text: str, ram: int, vram: int) -> None:
    found = machine(text)
    assert (found.ram_bytes, found.vram_bytes) == (ram, vram)


@pytest.mark.parametrize("text", ["", "8", "large", "disk=8GB", "8GB,9GB", "vram=0GB", "-8GB", "8 parsecs"])
def test_no_machines(text: str) -> None:
    with pytest.raises(Refused, match="describes no machine"):
        machine(text)


def test_this_machine_has_memory() -> None:
    assert here().ram_bytes > 0 and machine().places[-1][0] == "ram"


def small(trained: int = 131_072) -> Model:
    shape = Shape("x", (Kept(1024, 1024, 128, 128),) * 32, 4096, 14_336, 4096, 128_256, trained)
    return Model(shape, Weights(4_920_000_000, 300_000_000), LLAMA_CPP)


def test_nothing_fits_but_at_a_shorter_context_this_does() -> None:
    wanted = Wanted(131_072, 1, cache_types("f16"))
    only = fit(small(), wanted, Machine(8 * 10**9, 0, ""), [cache_type("q8_0"), cache_type("q4_0")])[0]
    assert not only.fits and only.spare_bytes < -10 * 10**9
    assert 0 < only.context < 131_072 and only.context % 256 == 0
    assert [name for name, _ in only.others] == ["q8_0", "q4_0"]
    assert only.others[0][1] == pytest.approx(only.context * 16 / 8.5, rel=0.05)
    for context, fits in ((only.context, True), (only.context + 256, False)):
        needed = memory(small(), replace(wanted, context=context)).bytes_
        assert (needed <= 8 * 10**9) is fits


def test_weights_alone_may_be_too_much() -> None:
    found = fit(small(), Wanted(512, 1, cache_types("f16")), Machine(2 * 10**9, 0, ""))[0]
    assert not found.fits and found.context == 0 and not found.others


def test_the_embedding_stays_in_main_memory() -> None:
    wanted = Wanted(8192, 1, cache_types("f16"))
    card, main = (memory(small(), wanted, place).parts[0].bytes_ for place in ("vram", "ram"))
    assert main - card == 300_000_000


def test_the_fastest_place_comes_first() -> None:
    places = fit(small(), Wanted(8192, 2, cache_types("q8_0")), machine("ram=64GB,vram=24GB"))
    assert [f.memory.place for f in places] == ["vram", "ram"] and all(f.fits for f in places)


def test_no_trained_context_proposes_up_to_what_is_asked() -> None:
    assert most_context(small(0), Wanted(4096, 1, cache_types("f16")), "ram", 1 << 40) == 4096


def test_runtimes_of_containers() -> None:
    assert runtime_of("gguf", True).name == "llama.cpp" and runtime_of("mlx", False).name == "mlx"
    assert runtime_of("awq", True).name == "vllm" and runtime_of("awq", False).name == "transformers"


@pytest.mark.parametrize("family", [*CONFIGS, *EXPERTS])
def test_a_planned_file_is_judged_as_the_file(family: str, tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", family, **EXTRA.get(family, {})))
    made = plan(parse("nearest : q4_0 > gguf"), source)
    quantize(source, made.recipe, tmp_path / "out.gguf")
    before, after = planned(made, source), as_it_is(tmp_path / "out.gguf")
    assert before == after and after.shape.vocabulary == source.config["vocab_size"]


@pytest.mark.parametrize("family", [*CONFIGS, *EXPERTS])
def test_keys_and_configuration_say_the_same(family: str, tmp_path: Path) -> None:
    """Of what transformers keeps and llama.cpp keeps: windows that llama.cpp does not heed aside."""
    source = SafetensorsFolder(make_model(tmp_path / "model", family, **EXTRA.get(family, {})))
    theirs = config_shape(source.config)
    ours = planned(plan(parse("nearest : q4_0 > gguf"), source), source).shape
    assert [(b.keys, b.values) for b in ours.blocks] == [(b.keys, b.values) for b in theirs.blocks]
    if family.startswith("gemma"):
        assert [b.window for b in ours.blocks] == [b.window for b in theirs.blocks]
    assert (ours.hidden, ours.queries, ours.trained) == (theirs.hidden, theirs.queries, theirs.trained)


def test_a_planned_folder_is_judged_by_its_tensors(tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", "llama"))
    recipe = parse("nearest : int4-g32 > compressed-tensors")
    made = plan(recipe, source)
    quantize(source, made.recipe, tmp_path / "out")
    before, after = planned(made, source), as_it_is(tmp_path / "out")
    assert before.weights == after.weights and before.shape == after.shape


def test_a_tied_head_is_held_once(tmp_path: Path) -> None:
    tied = as_it_is(make_model(tmp_path / "tied", "llama", tied=True)).weights
    untied = as_it_is(make_model(tmp_path / "untied", "llama", tied=False)).weights
    assert (
        untied.bytes_ - tied.bytes_
        == 4 * 128 * config_shape(SafetensorsFolder(tmp_path / "tied").config).vocabulary
    )


def test_the_carried_model() -> None:
    model = as_it_is(embedded_model())
    assert model.weights.bytes_ == 96_576_768 and model.weights.stays_bytes == 0
    assert model.shape.token_numbers == 2 * 30 * 192 and model.runtime is LLAMA_CPP


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(Refused, match="neither"):
        as_it_is(tmp_path / "x.bin")
    with pytest.raises(Refused, match="not modelled"):
        as_it_is(embedded_model(), "vllm")
    with pytest.raises(Refused, match="no runtime"):
        as_it_is(embedded_model(), "abacus")
