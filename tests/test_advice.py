"""Advice: ten questions with their answers, and the rules they go by. Models are published configurations."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bitmill.advise.advice import Advice, advise
from bitmill.advise.inventory import Bare, bare_model, sized
from bitmill.advise.machine import machine
from bitmill.advise.options import Asked, Judge
from bitmill.advise.quality import ELSEWHERE, HERE, MODELLED, Loss, _ladder, loss, read_measured
from bitmill.advise.rules import _table, job, jobs, ladder, runtime_for
from bitmill.advise.runtimes import RUNTIMES, runtime_named
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.planning import plan
from bitmill.recipe import parse
from tests import published
from tests.test_gguf import EXTRA
from tests.tiny import CONFIGS, EXPERTS, make_model


@cache
def bare(name: str) -> Bare:
    """A published model, by its configuration."""
    configs: dict[str, dict[str, Any]] = vars(published)
    return Bare(configs[name], Path(name))


def asked(text: str, wanted: str, context: int = 0, **more: Any) -> Asked:
    task, there = job(wanted), machine(text)
    program = RUNTIMES[more.pop("runtime", None) or runtime_for(task, there)[0]]
    known = {"parallel": task.parallel, "measured": {}, **more}
    return Asked(machine=there, job=task, runtime=program, context=context or task.context, **known)


def ask(models: str, text: str, wanted: str, context: int = 0, **more: Any) -> Advice:
    return advise([(name, bare(name)) for name in models.split()], asked(text, wanted, context, **more))


def answer(found: Advice) -> tuple[str, str, str, str]:
    assert found.chosen is not None
    return found.chosen.model, found.asked.runtime.name, found.chosen.recipe, found.chosen.kv


TEN = {
    "a 16 GB card and a 40-page paper": (
        ("QWEN3_14B QWEN3_8B QWEN3_4B", "rx9060xt 16GB + 32GB ddr5", "chat", 32_768),
        ("QWEN3_14B", "llama.cpp", "Q6_K", "q8_0"),
    ),
    "a Mac with 64 GB": (
        ("LLAMA_70B QWEN3_32B QWEN3_8B", "m2max 64GB", "chat", 16_384),
        ("QWEN3_32B", "mlx", "mlx-6bit", "bf16"),
    ),
    "a processor alone": (
        ("QWEN3_14B QWEN3_8B QWEN3_4B", "32GB ddr5 + 8 cores", "chat", 4096),
        ("QWEN3_4B", "llama.cpp", "Q6_K", "f16"),
    ),
    "serving on an A100": (
        ("LLAMA_70B LLAMA_8B", "a100", "serve", 8192), ("LLAMA_70B", "vllm", "awq", "fp8"),
    ),
    "serving on a Blackwell": (
        ("LLAMA_70B LLAMA_8B", "b200", "serve", 8192), ("LLAMA_70B", "vllm", "nvfp4", "bf16"),
    ),
    "fine-tuning in 24 GB": (
        ("QWEN3_14B LLAMA_8B", "rtx4090 + 64GB ddr5", "finetune", 2048),
        ("QWEN3_14B", "transformers", "nf4", "bf16"),
    ),
    "an edge board": (
        ("LLAMA_3B LLAMA_1B", "raspberry pi 5", "edge", 2048), ("LLAMA_3B", "llama.cpp", "Q5_K_M", "f16"),
    ),
    "a 70B on 24 GB": (
        ("LLAMA_70B", "rtx4090 + 64GB ddr5", "chat", 8192), ("LLAMA_70B", "llama.cpp", "IQ2_XS", "f16"),
    ),
    "a mixture on a 12 GB card with 64 GB": (
        ("QWEN3_30B_A3B QWEN3_14B", "rtx3060 + 64GB ddr4", "chat", 8192),
        ("QWEN3_30B_A3B", "llama.cpp", "Q6_K", "f16"),
    ),
    "a context of 128k": (
        ("LLAMA_8B LLAMA_3B", "rtx4060ti 16GB", "chat", 131_072), ("LLAMA_8B", "llama.cpp", "Q6_K", "q8_0"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("question", TEN)
def test_ten_questions(question: str) -> None:
    words, expected = TEN[question]
    found = ask(*words)
    assert answer(found) == expected
    plain = json.loads(json.dumps(found.to_json()))
    best = plain["answer"]
    assert best["loss"]["evidence"] in (HERE, ELSEWHERE, MODELLED) and best["loss"]["source"]
    assert best["bytes"]["evidence"] == "modelled" and all(part["evidence"] for part in best["parts"])
    assert best["speed"] is None or best["speed"]["evidence"] == "modelled"
    assert plain["runner_up"] is not None and plain["runner_up"]["lost"]
    assert all("(" in why for why in plain["why"][:1]), "a reason has its source"
    assert len(plain["tried"]) >= 4 and plain["machine"]["said"] == words[1]


def test_what_is_said_against_the_least_bad() -> None:
    found = ask("LLAMA_70B", "rtx4090 + 64GB ddr5", "chat", 8192)
    said = " ".join(found.caution)
    assert "4 bits" in said and "smaller model" in said and "EfficientQAT" in said and "measure it" in said
    assert found.chosen is not None and found.chosen.loss.evidence == ELSEWHERE
    assert (
        found.runner_up is not None and found.runner_up.recipe == "IQ4_XS" and "beside the card" in found.lost
    )


def test_a_smaller_model_beats_one_below_four_bits() -> None:
    found = ask("LLAMA_70B QWEN3_32B", "rtx4090 + 64GB ddr5", "chat", 8192)
    assert answer(found)[0] == "QWEN3_32B" and not found.caution and found.chosen.bits > 4  # type: ignore[union-attr]
    assert any("LLAMA_70B: nothing of it fits" in why for why in found.why)


def test_what_fits_beats_what_spills() -> None:
    found = ask("QWEN3_14B QWEN3_8B", "rtx4060 + 128GB 8x ddr5 + 32 cores", "chat", 4096)
    assert found.chosen is not None and found.chosen.whole
    spilled = [o for o in found.tried if not o.against and not o.whole]
    assert spilled and all(
        o.bits > found.chosen.bits or o.parameters > found.chosen.parameters for o in spilled
    )


def test_experts_may_be_beside_the_card() -> None:
    found = ask("QWEN3_30B_A3B QWEN3_14B", "rtx3060 + 64GB ddr4", "chat", 8192)
    assert found.chosen is not None and found.chosen.split is not None and found.chosen.split.experts_off
    assert not found.chosen.whole and any("few experts" in why for why in found.why)


def test_caches_before_weights_once_they_dominate() -> None:
    found = ask("LLAMA_8B", "rtx4060ti 16GB", "chat", 131_072)
    assert any("half of what the weights take" in why for why in found.why)
    short = ask("LLAMA_8B", "rtx4060ti 16GB", "chat", 8192)
    assert answer(short)[2:] == ("Q6_K", "f16")
    judge = Judge(
        "x", bare("LLAMA_8B"), asked("rtx4090", "chat", 8192), ladder("llama.cpp", job("chat")).try_
    )
    assert not judge.dominated()


@pytest.mark.parametrize(
    ("card", "recipe"), [("a100", "awq"), ("l40s", "fp8-dynamic"), ("h100", "fp8-dynamic"), ("b200", "nvfp4")]
)
def test_number_formats_only_where_the_hardware_has_them(card: str, recipe: str) -> None:
    found = ask("LLAMA_8B", card, "serve", 4096)
    assert answer(found)[2] == recipe
    lacking = [o for o in found.tried if o.recipe == "nvfp4"]
    assert all(("FP4 only" in o.against[0]) == (card != "b200") for o in lacking if o.against)
    assert card == "b200" or all(o.against for o in lacking)


def test_small_models_keep_more_bits() -> None:
    found = ask("LLAMA_1B", "raspberry pi 5", "edge")
    assert answer(found)[2] == "Q8_0"
    low = next(o for o in found.tried if o.recipe == "Q4_K_M")
    assert "under 1.5 billion" in low.against[0]


def test_precision_before_speed_for_code() -> None:
    assert answer(ask("LLAMA_8B", "rtx4090", "code"))[2] == "Q8_0"
    assert answer(ask("LLAMA_8B", "rtx4090", "chat"))[2] == "Q6_K"


def test_nothing_fits_but_at_a_shorter_context_this_does() -> None:
    found = ask("LLAMA_8B", "vram=8GB", "chat", 131_072)
    assert found.chosen is None and found.runner_up is None
    ((option, context),) = found.shorter
    assert 4096 < context < 131_072 and option.recipe == "IQ4_XS" and option.kv == "q8_0" and option.whole
    assert found.to_json()["shorter"][0]["context"] == context
    again = ask("LLAMA_8B", "vram=8GB", "chat", context)
    assert again.chosen is not None
    assert not ask("LLAMA_70B", "vram=8GB", "chat").shorter, "nor at any other"


def test_a_measurement_overrules_the_rule() -> None:
    def known(**kld: float) -> dict[str, Loss]:
        return {str(parse(name)): Loss(value, HERE, "x") for name, value in kld.items()}

    words = ("QWEN3_8B", "rtx4060ti 16GB", "chat", 8192)
    assert answer(ask(*words))[2] == "Q6_K"
    worse = ask(*words, measured=known(Q6_K=0.2, Q5_K_M=0.012))
    assert answer(worse)[2] == "Q5_K_M" and any(
        "measured here" in o.against[0] for o in worse.tried if o.against
    )
    smaller = ask(*words, measured=known(Q6_K=0.012, Q4_K_M=0.011))
    assert answer(smaller)[2] == "Q4_K_M" and "the rules put Q6_K first" in smaller.why[-1]
    assert smaller.chosen is not None and smaller.chosen.loss.evidence == HERE
    low = ask("LLAMA_8B", "vram=5.5GB + 8GB ddr4", "chat", 2048, measured=known(IQ3_XXS=0.03))
    assert answer(low)[2] == "IQ3_XXS" and not low.caution, "below the floor, and measured good enough"


def test_what_is_modelled_lies_on_the_ladder() -> None:
    points = _ladder()
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))
    assert loss("awq", 4.25, "llama", {}).evidence == MODELLED
    assert 0.03 < loss("awq", 4.16, "llama", {}).kld < 0.06
    assert loss("Q4_K_M", 4.8, "qwen3", {}).evidence == MODELLED
    assert loss("hf-bf16", 16, "qwen3", {}).kld == 0


def test_records_of_measurements(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"kld": {"mean": 0.02}, "tokens": 3060}))
    found = read_measured([f"q4_k_m={file}"])
    assert found[str(parse("Q4_K_M"))] == Loss(0.02, HERE, "m.json, 3,060 tokens")
    for text in ("Q4_K_M", f"Q4_K_M={tmp_path / 'none'}", f"Q4_K_N={file}"):
        with pytest.raises(Refused):
            read_measured([text])
    for bad in ("{}", '{"kld": 3}', '{"kld": {"mean": null}}', '{"kld": {"mean": -1}}', "[]"):
        file.write_text(bad)
        with pytest.raises(BadFile):
            read_measured([f"Q4_K_M={file}"])


def test_the_table_of_rules_is_whole() -> None:
    table = _table()
    for row in table["ladder"]:
        assert row["runtime"] in RUNTIMES and set(row["jobs"]) <= set(jobs()) and row["source"]
        assert all(parse(name) for name in (*row["try"], *row["last"]))
    for row in table["runtime"]:
        assert row["use"] in RUNTIMES and row["why"] and row["source"]
        assert row["job"] in (*jobs(), "any")
    for name in jobs():
        assert job(name).why and job(name).source
        for text in ("rtx4090", "m2max", "8GB", "rx7900xtx", "raspberry pi 5"):
            assert ladder(runtime_for(job(name), machine(text))[0], job(name)).try_
    assert set(table["needs"]) <= {name for row in table["ladder"] for name in row["try"]}


def test_what_is_refused() -> None:
    for call in (
        lambda: job("dance"),
        lambda: runtime_named("abacus"),
        lambda: ladder("mlx", job("finetune")),
    ):
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.fix
    with pytest.raises(Refused, match="no model"):
        advise([], asked("8GB", "chat"))


@pytest.mark.parametrize("family", [*CONFIGS, *EXPERTS])
@pytest.mark.parametrize("recipe", ["q8_0 > gguf", "int4-g32-sym > compressed-tensors"])
def test_shapes_alone_give_the_bytes_of_a_plan(family: str, recipe: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family, **EXTRA.get(family, {}))
    made = plan(parse(recipe), SafetensorsFolder(folder))
    stored = sum(slot.bytes_ for image in made.files for slot in image.slots)
    found = sized(bare_model(str(folder)), parse(recipe))
    assert found.weights.bytes_ == pytest.approx(stored, rel=0.02)
    assert bare_model(str(folder / "config.json")).parameters == made.parameters


def test_configurations_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("[1]")
    with pytest.raises(BadFile):
        bare_model(str(file))
    file.write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(Refused, match="does not know"):
        bare_model(str(file))
    with pytest.raises(Refused):
        bare_model(str(tmp_path / "nothing"))
    with pytest.raises(Refused, match="no values"):
        bare("LLAMA_1B").read("lm_head.weight")
