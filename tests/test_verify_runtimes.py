"""Load contracts: what is written here loads where it should, and what a runtime cannot load is found."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.planning import Plan, plan
from bitmill.recipe import parse
from bitmill.trust.contracts import contracts, target, version_of
from bitmill.trust.findings import LEVELS
from bitmill.trust.layers import layers_of
from bitmill.trust.planned import judge_plan, loader_remarks, refuse_unloadable
from bitmill.trust.rules import judge
from bitmill.trust.stored import planned, stored
from tests.tiny import make_model
from tests.written import write

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4}  # fmt: skip

GOOD = [
    ("bf16 > safetensors", ("vllm", "sglang", "transformers", "mlx")),
    ("int4-g128-sym > compressed-tensors", ("vllm", "vllm@0.9", "sglang", "transformers")),
    ("int4-g64-asym > compressed-tensors", ("vllm", "vllm@0.8.5")),
    ("int8-channel-sym, input=int8-token > compressed-tensors", ("vllm", "sglang", "transformers")),
    ("fp8-e4m3-channel, input=fp8-e4m3-token > compressed-tensors", ("vllm", "sglang", "transformers")),
    ("fp8-e4m3-b128 > compressed-tensors", ("vllm", "transformers")),
    ("nvfp4, dtype=bf16 > compressed-tensors", ("vllm", "sglang", "transformers")),
    ("mxfp4, dtype=bf16 > compressed-tensors", ("vllm", "transformers")),
    ("int4-g128-sym, cache=fp8 > compressed-tensors", ("vllm",)),
    ("int4-g128-sym > gptq", ("vllm", "vllm@0.9", "sglang", "transformers")),
    ("int4-g64-asym > gptq(version=2)", ("vllm", "transformers")),
    ("int4-g128-asym > awq", ("vllm", "sglang", "transformers", "transformers@4.57", "mlx")),
    ("int4-g128-sym > auto-round", ("vllm", "sglang", "transformers")),
    ("fp8-e4m3-b128 > fp8", ("vllm", "sglang", "transformers")),
    ("fp8-e4m3-tensor > fp8", ("vllm", "transformers")),
    ("mxfp8 > fp8", ("transformers",)),
    ("nf4-b64-dq > bitsandbytes", ("vllm@0.27", "transformers")),
    ("llm-int8 > bitsandbytes", ("vllm@0.27", "transformers")),
    ("int4-g64-bias, embed=int4-g64-bias, head=int4-g64-bias > mlx", ("mlx",)),
    ("mxfp4 > mlx", ("mlx",)),
    ("int4-g64-fz > hqq", ("transformers@4.57",)),
    ("int8-channel-sym > torchao", ("transformers", "vllm")),
    ("spqr : spqr3-g16-o1-act, dtype=f16 > spqr", ("transformers",)),
    ("q4_k > gguf", ("llama.cpp", "llama.cpp@2024-06", "transformers")),
    ("iq4_xs > gguf", ("llama.cpp",)),
]


@functools.cache
def source(family: str = "llama", tied: bool = False) -> Checkpoint:
    folder = Path(tempfile.mkdtemp(prefix="bitmill-tests-"))
    sizes = {"num_hidden_layers": 1} if family == "mixtral" else WIDE
    return SafetensorsFolder(make_model(folder, family, tied=tied, dtype="bfloat16", **sizes))


@functools.cache
def made(line: str, family: str = "llama") -> Plan:
    return plan(parse(line if " : " in line else f"nearest : {line}"), source(family))


def found(line: str, runtime: str, tp: int = 1, family: str = "llama") -> list[tuple[str, str]]:
    return [(f.level, f.what) for f in judge_plan(made(line, family).files, target(runtime), tp)]


@pytest.mark.parametrize(("line", "runtime"), [(line, to) for line, some in GOOD for to in some])
def test_what_is_written_here_loads_where_it_should(line: str, runtime: str) -> None:
    wrong = [f for f in judge_plan(made(line).files, target(runtime)) if f.level == "error"]
    assert not wrong


BAD = [
    ("int3-g128-sym > compressed-tensors", "vllm@0.20", 1, "error", "4 and 8 bits only"),
    ("int3-g128-sym > compressed-tensors", "vllm", 1, "warning", "Humming"),
    ("int3-g128-sym > compressed-tensors", "sglang", 1, "error", "not of 3"),
    ("int3-g128-asym > compressed-tensors", "vllm", 1, "error", "zero points for integers of 4 and 8"),
    ("int4-g128-asym > compressed-tensors", "vllm@0.8.4", 1, "error", "0.8.5 and later"),
    ("int4-g128-asym > compressed-tensors", "transformers", 1, "warning", "default route"),
    ("int8-g128-asym > compressed-tensors", "vllm", 1, "warning", "no Marlin kernel"),
    ("int4-g16-sym > compressed-tensors", "vllm", 1, "warning", "groups of 16"),
    ("int4-g16-sym > compressed-tensors", "sglang", 1, "error", "not of 16"),
    ("int4-g128-sym, q=int8-channel-sym > compressed-tensors", "vllm", 1, "error", "stored alike"),
    ("int4-g128-sym, gate=bf16 > compressed-tensors", "sglang", 1, "error", "stored alike"),
    ("int4-g128-sym, head=int8-channel-sym > compressed-tensors", "vllm@0.20", 1, "error", "head as dense"),
    ("int4-g128-sym, cache=int8-tensor-static > compressed-tensors", "vllm", 1, "error", "FP8 cache only"),
    ("int4-g128-sym, input=int4-token > compressed-tensors", "vllm", 1, "error", "multiplies no inputs"),
    ("int4-g128-sym, input=int8-token > compressed-tensors", "vllm", 1, "warning", "ARM"),
    ("int8-channel-asym, input=int8-token > compressed-tensors", "vllm", 1, "error", "symmetric weights"),
    ("mxfp6-e2m3, dtype=bf16 > compressed-tensors", "vllm", 1, "error", "no scheme"),
    ("nvfp4, dtype=bf16 > compressed-tensors", "vllm@0.8", 1, "error", "no NVFP4"),
    ("int4-g128-sym > compressed-tensors", "vllm", 3, "error", "heads cannot be parted among 3"),
    ("int4-g128-sym > compressed-tensors", "vllm", 4, "error", "whole groups of 128"),
    ("int4-g32-sym > compressed-tensors", "vllm@0.20", 4, "warning", "multiples of 64"),
    ("int4-g128-sym > compressed-tensors", "transformers", 2, "error", "does not part layers"),
    ("int4-g128-sym > compressed-tensors", "mlx", 1, "error", "does not load"),
    ("fp8-e5m2-tensor > fp8", "vllm", 1, "error", "E4M3 only"),
    ("fp8-e4m3-b128 > fp8", "vllm", 2, "error", "no multiple of 128"),
    ("int4-g128-sym > gptq", "mlx", 1, "error", "AWQ's order"),
    ("int3-g128-sym > gptq", "vllm", 1, "warning", "float16 only"),
    ("int4-g128-sym, down=int8-g128-sym > gptq", "transformers", 1, "error", "optimum hears no rule"),
    ("int4-g64-asym > gptq", "transformers", 1, "warning", "version 1"),
    ("nf4-b64-dq > bitsandbytes", "vllm", 1, "warning", "vllm-bnb-plugin"),
    ("nf4-b64-dq > bitsandbytes", "vllm@0.27", 2, "error", "cannot be parted"),
    ("int4-g64-fz > hqq", "transformers", 1, "error", "before 5"),
    ("int4-g64-fz > hqq", "vllm", 1, "error", "before 0.15"),
    ("int4-g64-bias > mlx", "vllm", 1, "error", "MLX folders"),
    ("e8p > bitmill", "vllm", 1, "error", "does not load"),
    ("q4_k > gguf", "vllm", 1, "warning", "vllm-gguf-plugin"),
    ("q4_k > gguf", "mlx", 1, "error", "GGUF files"),
    ("mxfp4 > gguf", "llama.cpp@2025-06", 1, "error", "August 2025"),
    ("nvfp4-flat > gguf", "llama.cpp@2026-01", 1, "error", "March 2026"),
    ("iq2_xxs > gguf", "llama.cpp@2024-01", 1, "error", "I-quants"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "runtime", "tp", "level", "said"), BAD)
def test_what_a_runtime_cannot_load_is_found(line: str, runtime: str, tp: int, level: str, said: str) -> None:
    findings = found(line, runtime, tp)
    assert [known for known, what in findings if said in what] == [level], findings
    if level == "error":
        with pytest.raises(Refused, match="could not load this"):
            refuse_unloadable(made(line).files, target(runtime), tp)


@pytest.mark.parametrize(
    ("line", "runtime", "level", "said"),
    [
        ("int4-g32-sym > gptq", "transformers", "error", "experts of a mixture"),
        ("nvfp4, dtype=bf16 > compressed-tensors", "transformers", "error", "without a word"),
        ("int4-g32-asym > compressed-tensors", "transformers", "error", "zero points fail"),
        ("int4-g32-sym, down=int8-channel-sym > compressed-tensors", "vllm", "error", "stored alike"),
    ],
)
def test_experts(line: str, runtime: str, level: str, said: str) -> None:
    findings = found(line, runtime, family="mixtral")
    assert [known for known, what in findings if said in what] == [level], findings


@pytest.mark.parametrize(
    ("line", "family"),
    [(line, "llama") for line, *_ in BAD]
    + [("nvfp4, dtype=bf16 > compressed-tensors", "mixtral"), ("int4-g32-asym > awq", "mixtral")],
)
def test_a_plan_says_what_verify_says(line: str, family: str) -> None:
    """One source of facts: every remark quotes a finding of the newest version of the program it names."""
    remarks = loader_remarks(made(line, family).files)
    assert set(remarks) <= set(made(line, family).remarks)
    named = {str(to): to for to in (target(name) for name in contracts())}
    quoted = {
        finding.what
        for to in named.values()
        for finding in judge_plan(made(line, family).files, to)
        if finding.level == "error" or finding.doubt
    }
    for remark in remarks:
        assert any(what in remark for what in quoted) or "newest versions" in remark, remark
        assert any(title in remark for title in named) or "before" in remark


def test_a_plan_says_nothing_where_nothing_is_wrong() -> None:
    assert [loader_remarks(made(line).files) for line, _ in GOOD if "hqq" not in line] == [()] * (
        len(GOOD) - 1
    )
    assert "transformers before 5" in loader_remarks(made("int4-g64-fz > hqq").files)[0]


def test_strict_refuses_what_nobody_or_only_a_liar_loads() -> None:
    for line, said in (
        ("int4-g32-asym > awq", "AWQ folder"),
        ("nvfp4, dtype=bf16 > compressed-tensors", "without a word"),
    ):
        with pytest.raises(Refused, match=f"--strict: .*{said}"):
            plan(parse(f"nearest : {line}"), source("mixtral"), strict=True)
    plan(parse("nearest : int4-g16-sym > compressed-tensors"), source(), strict=True)


@pytest.mark.parametrize(
    "line",
    [
        "int4-g64-asym > compressed-tensors",
        "nvfp4, dtype=bf16 > compressed-tensors",
        "fp8-e4m3-channel, input=fp8-e4m3-token > compressed-tensors",
        "int4-g128-asym > awq",
        "int3-g128-sym, q=int8-channel-sym > gptq",
        "int4-g128-sym, down=int2-g64-sym > auto-round",
        "fp8-e4m3-b128 > fp8",
        "mxfp8 > fp8",
        "nf4-b64-dq > bitsandbytes",
        "int4-g64-bias, down=int6-g32-bias > mlx",
        "q4_k, down=q6_k > gguf",
    ],
)
def test_a_plan_is_judged_as_its_file_will_be(line: str, tmp_path: Path) -> None:
    plan_ = made(line)
    out = write(plan_.container, source(), plan_.rows, tmp_path).path
    before, after = planned(plan_.files), stored(out)
    assert before.parts == after.parts and before.settings == after.settings
    ours, theirs = layers_of(before), layers_of(after)
    assert ours.all == theirs.all and not ours.found and not theirs.found
    quantized = {row.name.removesuffix(".weight"): row.shape for row in plan_.rows if str(row.grid) != "bf16"}
    if not after.gguf:
        shapes = {
            layer.module: layer.shape for layer in theirs.all if layer.kind != "dense" and layer.shape[0]
        }
        assert shapes == ({} if "nf4" in line else quantized)
    for runtime in contracts():
        known = [(f.level, f.what) for f in judge(before, ours, target(runtime))]
        seen = [(f.level, f.what) for f in judge(after, theirs, target(runtime))]
        assert [f for f in seen if "scales of their own" not in f[1]] == known  # no plan knows numbers


def test_joined_layers_share_nvfp4s_global_scale(tmp_path: Path) -> None:
    plan_ = made("nvfp4, dtype=bf16 > compressed-tensors")
    out = write(plan_.container, source(), plan_.rows, tmp_path).path  # each weight alone, without the mill
    tensors = load_file(out / "model.safetensors")
    said = [
        f for f in judge(stored(out), layers_of(stored(out)), target("vllm")) if "global scales" in f.what
    ]
    assert [f.level for f in said] == ["error"]
    for name in tensors:
        if name.endswith("weight_global_scale"):
            tensors[name] = torch.full_like(tensors[name], 100.0)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    model = stored(out)
    assert not [f for f in judge(model, layers_of(model), target("vllm")) if "global scales" in f.what]


def change(folder: Path, key: str, value: object) -> None:
    """Set one key of the quantization's settings."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("line", "key", "value", "said"),
    [
        ("int4-g128-sym > compressed-tensors", "ignore", [], "stored dense"),
        (
            "int4-g128-sym > compressed-tensors",
            "ignore",
            ["lm_head", "re:.*q_proj$"],
            "the settings say that it is dense",
        ),
        ("int4-g128-sym > compressed-tensors", "ignore", ["lm_head", "re:(a+)+$"], "may never end"),
        ("int4-g128-sym > compressed-tensors", "config_groups", {"g": 3}, "no group"),
        (
            "int4-g128-asym > awq",
            "modules_to_not_convert",
            ["down_proj"],
            "the settings say that it is dense",
        ),
        ("int4-g128-sym > gptq", "dynamic", {"-:.*v_proj": {}}, "the settings say that it is dense"),
        (
            "int4-g128-sym > gptq",
            "modules_in_block_to_quantize",
            ["self_attn.q_proj"],
            "say that it is dense",
        ),
        (
            "int4-g128-sym, o=bf16 > auto-round",
            "extra_config",
            {},
            "stored dense",
        ),
        ("fp8-e4m3-b128 > fp8", "modules_to_not_convert", ["model.layers.1"], "say that it is dense"),
        ("nf4-b64-dq > bitsandbytes", "llm_int8_skip_modules", ["up_proj"], "say that it is dense"),
    ],
)
def test_settings_that_contradict_the_tensors(
    line: str, key: str, value: object, said: str, tmp_path: Path
) -> None:
    plan_ = made(line)
    out = write(plan_.container, source(), plan_.rows, tmp_path).path
    change(out, key, value)
    findings = layers_of(stored(out)).found
    assert findings and all(f.level == "error" for f in findings)
    assert any(said in f.what for f in findings), findings


def test_words_of_another_width(tmp_path: Path) -> None:
    plan_ = made("int4-g64-bias > mlx")
    out = write(plan_.container, source(), plan_.rows, tmp_path).path
    config = json.loads((out / "config.json").read_text())
    config["quantization"]["bits"] = 3
    (out / "config.json").write_text(json.dumps(config))
    assert any("words a row" in f.what for f in layers_of(stored(out)).found)


def test_tables_are_whole() -> None:
    assert set(contracts()) == {"bitmill", "llama.cpp", "mlx", "sglang", "transformers", "vllm"}
    for contract in contracts().values():
        assert contract.date.startswith("20") and contract.methods
        assert len({rule.id for rule in contract.rules}) == len(contract.rules), contract.name
        for rule in contract.rules:
            assert rule.level in LEVELS and rule.what and rule.source and rule.date, rule.id
            assert rule.span.since < rule.span.until
        assert all(method.level in LEVELS and method.source for method in contract.methods)


def test_versions() -> None:
    assert version_of("0.11.2") == (0, 11, 2) < version_of("0.24") < version_of("1.0rc1")
    assert target("vllm@v0.9.1").version == (0, 9, 1)
    assert target("LLAMACPP").contract.name == "llama.cpp" and target("hf").contract.name == "transformers"
    for text in ("abacus", "vllm@new", "llama.cpp@b6000", "llama.cpp@0.3"):
        with pytest.raises(Refused):
            target(text)
