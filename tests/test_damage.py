"""Damage of types by tensor: against the divergence that is measured, at every kind of use; kept, re-used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill.calibrate import damage as damages
from bitmill.calibrate.damage import Damage, measure_damage, memory_needed
from bitmill.calibrate.tokens import Calibration
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, Refused
from bitmill.core.experts import stack_of
from bitmill.core.registry import parse_grid
from bitmill.families.base import describe, traits
from bitmill.run.load import load_model
from bitmill.run.memory import available_bytes
from bitmill.source import open_source
from tests.tiny import EXPERTS, make_model, tokens

TOKENS = Calibration(tokens(16, 48))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that every type of the menu fits; an untied head."""
    folder = tmp_path_factory.mktemp("wide")
    return make_model(folder, tied=False, hidden_size=256, head_dim=64, num_hidden_layers=2)


@pytest.fixture(scope="module")
def measured(wide: Path) -> Damage:
    return measure_damage(open_source(str(wide)), TOKENS)


def test_every_matrix_and_type_and_more_bits_cost_less(wide: Path, measured: Damage) -> None:
    matrices = [n for n, f in open_source(str(wide)).tensors.items() if len(f.shape) == 2]
    assert list(measured.nats) == matrices and len(matrices) == 16
    for name, costs in measured.nats.items():
        assert ("iq2_xs" in costs) == (".layers." in name)
        assert costs["q2_k"] > costs["q4_k"] > costs["q6_k"] > costs["q8_0"] > costs["f16"] >= 0
    assert measured.facts["windows"] == 16 and measured.facts["window"] == 48


@pytest.mark.parametrize("role", ["q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"])
def test_it_predicts_the_divergence_that_is_measured(wide: Path, measured: Damage, role: str) -> None:
    kind = "q4_k"
    model = load_model(open_source(str(wide)))
    names = [name for name in measured.nats if role in name]
    with torch.no_grad():
        before = torch.log_softmax(model(input_ids=TOKENS.tokens).logits, -1)
        for name in names:
            weight = model.get_parameter(name)
            weight.copy_(parse_grid(kind).round(weight.data.clone()).dense())
        after = torch.log_softmax(model(input_ids=TOKENS.tokens).logits, -1)
    found = float((before.exp() * (before - after)).sum(-1).mean())
    predicted = sum(measured.nats[name][kind] for name in names)
    assert 0.5 < found / predicted < 2.0


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_a_tied_table_counts_twice_and_any_width_has_types(tmp_path: Path, family: str) -> None:
    source = open_source(str(make_model(tmp_path / "m", family)))
    found = measure_damage(source, Calibration(tokens(2, 16)))
    assert set(found.nats["model.embed_tokens.weight"]) == {"q4_0", "q5_0", "q8_0", "f16"}
    assert all(cost > 0 for costs in found.nats.values() for cost in costs.values())


def test_a_sample_of_rows_stands_for_all(
    wide: Path, measured: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damages, "ROWS", 10**6)
    whole = measure_damage(open_source(str(wide)), TOKENS)
    for name, costs in whole.nats.items():
        for kind in ("q2_k", "q4_k"):
            assert measured.nats[name][kind] == pytest.approx(costs[kind], rel=0.15)


def test_kept_and_read_again(wide: Path, measured: Damage, tmp_path: Path) -> None:
    source = open_source(str(wide))
    path = tmp_path / "d.json"
    measured.save(path)
    again = Damage.load(path, source)
    assert again.nats == measured.nats and again.facts == measured.facts
    with pytest.raises(Refused, match="another model"):
        Damage.load(path, open_source(str(make_model(tmp_path / "other"))))
    for text in ("", "[]", "{}", '{"kind": "bitmill-damage-1"}', '{"kind": "bitmill-damage-1", "nats": 3}'):
        path.write_text(text)
        with pytest.raises(BadFile, match="not a measurement"):
            Damage.load(path, source)


def test_a_model_larger_than_memory_is_refused(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(wide))
    needed = memory_needed(source, 48)
    monkeypatch.setattr(damages, "available_bytes", lambda: needed - 1)
    with pytest.raises(Refused, match=f"{needed:,} bytes, {needed - 1:,} are free"):
        measure_damage(source, TOKENS)


def test_available_memory(tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  9 kB\nMemAvailable:   4 kB\n")
    assert available_bytes(told, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes(told, tmp_path) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(told, tmp_path) == 4096
    assert available_bytes(tmp_path / "absent", tmp_path) > 1 << 28


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_predict_the_divergence_that_is_measured(family: str, tmp_path: Path) -> None:
    source = open_source(str(mixture(tmp_path / "m", family)))
    found = measure_damage(source, TOKENS)
    matrices = {n for n, f in source.tensors.items() if len(f.shape) == 2}
    assert {describe(source.config).role(name)[0] for name in matrices - set(found.nats)} == {"router"}
    changed = {n: source.read(n).float() for n in found.nats if ".experts." in n}
    assert len({stack_of(name) for name in changed}) == 6
    model = load_model(source)
    with torch.no_grad():
        before = torch.log_softmax(model(input_ids=TOKENS.tokens).logits, -1)
        for layer, block in enumerate(model.model.layers):
            joined, down = block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj
            for stack, place in zip(stacks(family, layer), (*joined.chunk(2, 1), down), strict=True):
                for expert, weight in enumerate(place):
                    weight.copy_(parse_grid("q2_k").round(changed[stack.format(expert)]).dense())
        after = torch.log_softmax(model(input_ids=TOKENS.tokens).logits, -1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 < measured / sum(found.nats[name]["q2_k"] for name in changed) < 2.0


@pytest.mark.parametrize("family", EXPERTS)
def test_an_expert_without_tokens_counts_as_with_one(family: str, tmp_path: Path) -> None:
    source = open_source(str(mixture(tmp_path / "m", family)))
    seen = sent(source, tokens(1, 2))
    found = measure_damage(source, Calibration(tokens(1, 2)))
    quiet = [(layer, e) for layer, counts in enumerate(seen) for e, n in enumerate(counts.tolist()) if not n]
    assert quiet
    names = [stack.format(e) for layer, e in quiet for stack in stacks(family, layer)]
    assert sorted(found.facts["unseen"]) == sorted(names)
    for layer, e in quiet:
        for stack in stacks(family, layer):
            others = sum(found.nats[stack.format(o)]["q4_k"] for o, n in enumerate(seen[layer].tolist()) if n)
            assert found.nats[stack.format(e)]["q4_k"] == pytest.approx(others / int(seen[layer].sum()))


def mixture(folder: Path, family: str) -> Path:
    """Rows of 256 everywhere."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    more = {"moe_intermediate_size": 256} if family == "qwen3moe" else {}
    return make_model(folder, family, tied=False, **sizes, **more)


def stacks(family: str, layer: int) -> list[str]:
    """Names of gate, up and down of a block's experts, with a place for the number."""
    mixtral = family == "mixtral"
    path = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}.experts.{{}}."
    leaves = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    return [f"{path}{leaf}.weight" for leaf in leaves]


def sent(source: Checkpoint, ids: torch.Tensor) -> list[torch.Tensor]:
    """How many tokens transformers' own router sends each expert, by block."""
    model = load_model(source)
    chosen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mlp.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1].reshape(-1)))
    with torch.no_grad():
        model(input_ids=ids)
    count = traits(source.config)["experts"]
    return [numbers.bincount(minlength=count) for numbers in chosen]
