"""The verb ``budget``, and budgets of ``quantize``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path

import pytest

from bitmill.budgeting import budgeted, limit_of
from bitmill.calibrate.damage import Damage
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadRecipe, Refused
from bitmill.core.experts import stack_of
from bitmill.core.registry import parse_grid
from bitmill.core.sizes import size_of
from bitmill.lots import MENUS, lots_of, menu
from bitmill.mill import quantize
from bitmill.recipe import parse
from bitmill.source import open_source
from tests.cli.command import Command
from tests.test_damage import mixture
from tests.tiny import EXPERTS, make_model

TEXT = "The miller weighs each grain and writes the number down. " * 200


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    return make_model(folder, hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "mill.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def damage(wide: Path) -> Damage:
    """Made up: what counts here is what is done with it."""
    source = open_source(str(wide))
    bits = {"iq2_xxs": 2.1, "q2_k": 2.6, "q3_k": 3.4, "q4_k": 4.5, "q6_k": 6.6, "q8_0": 8.5, "f16": 16.0}
    names = [name for name, fact in source.tensors.items() if len(fact.shape) == 2]
    nats = {name: {k: (i + 1) * 4.0**-b for k, b in bits.items()} for i, name in enumerate(names)}
    return Damage(nats, {"model": source.digest, "windows": 1, "window": 8, "sha256": "0"})


def test_budget_then_quantize(command: Command, wide: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.toml"
    words = ("--calib", text, "--nsamples", "2", "--seqlen", "32")
    said = command("budget", wide, "--size", "1MiB", "-o", out, *words)
    assert said.code == 0, said.err
    assert "summing gradients 2/2" in said.err and "r.toml.damage.json" in said.err
    assert "of 1,048,576 bytes" in said.out and "predicted KL divergence" in said.out
    small = tmp_path / "small.toml"
    again = command("budget", wide, "--size", "800k", "-o", small, "--damage", f"{out}.damage.json", "--json")
    assert again.code == 0, again.err
    assert "measured before" in again.err and again.json["bytes"] <= again.json["limit"] == 800_000
    plan = command("plan", wide, small, "--json").json
    assert plan["bytes"] == again.json["bytes"]
    assert {r["name"]: r["grid"] for r in plan["rows"] if r["name"] in again.json["types"]} == again.json[
        "types"
    ]
    file = tmp_path / "q.gguf"
    more = ("--damage", f"{out}.damage.json", "--calib", text, "--nsamples", "4", "--seqlen", "32")
    made = command("quantize", wide, "--size", "800k", "-o", file, *more, "--no-measure", "--json")
    assert made.code == 0, made.err
    assert file.stat().st_size == plan["bytes"] <= 800_000 and "predicted KL divergence" in made.err
    about = command("inspect", file, "--json")
    assert about.code == 0 and str(again.json["recipe"]) in about.out.replace("\\\\", "\\")


def test_within_the_limit_and_monotone(wide: Path, damage: Damage) -> None:
    source = open_source(str(wide))
    before = float("inf")
    for limit in range(700_000, 3_200_000, 50_000):
        made = budgeted(source, damage, limit, solver="nearest")
        assert made.plan.bytes_ <= limit and made.budget.damage <= before
        assert parse(str(made.recipe)) == made.recipe
        before = made.budget.damage
    assert set(made.shares) == {"f16"}
    few = budgeted(source, damage, 1_200_000, solver="nearest", types=("q4_k", "q8_0"))
    assert set(few.shares) == {"q4_k", "q8_0"}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_of_a_stack_have_one_type(command: Command, family: str, text: Path, tmp_path: Path) -> None:
    model, out, kept = mixture(tmp_path / "m", family), tmp_path / "q.gguf", tmp_path / "d.json"
    source = open_source(str(model))
    parameters = sum(prod(fact.shape) for fact in source.tensors.values())
    limit = parameters * 4 // 8
    words = ("--calib", text, "--nsamples", "2", "--seqlen", "32", "--damage", kept, "--no-measure")
    made = command("quantize", model, "--size", str(limit), "-o", out, *words)
    assert made.code == 0, made.err
    assert 0.9 * limit < out.stat().st_size <= limit
    budget = budgeted(source, Damage.load(kept, source), limit)
    types: dict[str, set[str]] = {}
    for name, kind in budget.types.items():
        types.setdefault(stack_of(name), set()).add(kind)
    assert set(types) == {stack_of(name) for name in Damage.load(kept, source).nats}
    assert all(len(kinds) == 1 for kinds in types.values())
    assert len({kind for stack, (kind,) in types.items() if "{}" in stack}) > 1
    rows = {row.name: str(row.grid) for row in budget.plan.rows}
    assert all(rows[name] == kind for name, kind in budget.types.items())
    assert sum(budget.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", *EXPERTS])
@pytest.mark.parametrize("container", sorted(set(MENUS) - {"gguf"}))
def test_in_every_container(family: str, container: str, tmp_path: Path) -> None:
    """Within the limit and monotone, on lots that the container's programs take."""
    model = mixture(tmp_path / "m", family)
    source = open_source(str(model))
    menu_of = menu(container) or ("q2_k", "q3_k", "q4_k", "q6_k", "q8_0")
    damage = made_up(source, menu_of)
    parameters = sum(prod(fact.shape) for fact in source.tensors.values())
    before, seen = float("inf"), set()
    for bits in (6.0, 8.0, 9.0, 10.0, 12.0, 20.0, 40.0):
        try:
            made = budgeted(source, damage, int(parameters * bits / 8), solver="nearest", container=container)
        except Refused as error:
            assert bits < 10 and "too few" in str(error)
            continue
        assert made.plan.bytes_ <= made.limit and made.budget.damage <= before
        assert parse(str(made.recipe)) == made.recipe
        rows = {row.name: str(row.grid) for row in made.plan.rows}
        assert all(
            rows[name] == kind or rows[name].startswith(f"{kind}-") for name, kind in made.types.items()
        )
        together: dict[str, set[str]] = {}
        for lot in lots_of([row for row in made.plan.rows if row.name in made.types], container, source):
            together.setdefault(lot.name, set()).update(made.types[row.name] for row in lot.rows)
        assert all(len(kinds) == 1 for kinds in together.values())
        before = made.budget.damage
        seen |= set(made.types.values())
    assert len(seen) > 2
    few = budgeted(source, damage, parameters * 5, solver="nearest", container=container, types=menu_of[:1])
    assert {kind for name, kind in few.types.items() if ".layers." in name} == {menu_of[0]}
    refused = {"gptq": "experts of a mixture", "auto_round": "experts of a mixture"}
    if family == "llama" or container not in refused:
        out = tmp_path / "out"
        made = budgeted(source, damage, int(parameters * 10 / 8), solver="nearest", container=container)
        quantize(source, str(made.recipe), out)
        assert open_source(str(out)).tensors.keys() == source.tensors.keys()
        assert sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) <= made.limit


def made_up(source: Checkpoint, kinds: Sequence[str]) -> Damage:
    """Less for more bits, and for tensors that come first."""
    names = [name for name, fact in source.tensors.items() if len(fact.shape) == 2 and "gate.w" not in name]
    bits = {kind: parse_grid(kind).storage_bits((256, 256)) / 65536 for kind in (*kinds, "f16")}
    nats = {name: {k: 4.0**-b / (i + 1) for k, b in bits.items()} for i, name in enumerate(names)}
    return Damage(nats, {"model": source.digest, "windows": 1, "window": 8, "sha256": "0"})


def test_a_budget_of_another_container(command: Command, wide: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    words = ("--container", "mlx", "--calib", text, "--nsamples", "2", "--seqlen", "32", "--no-measure")
    made = command("quantize", wide, "--bpw", "6.5", "-o", out, *words)
    assert made.code == 0, made.err
    told = json.loads((out / "config.json").read_text())["quantization"]
    assert len({one["bits"] for one in told.values() if isinstance(one, dict)} | {told["bits"]}) > 1
    refused = command("budget", wide, "--bpw", "6", "-o", tmp_path / "r.toml", "--container", "awq")
    assert refused.code == 2 and "budgets do not choose types for awq" in refused.err
    assert command("quantize", wide, "Q4_0", "--container", "mlx", "--dry-run").code == 2


def test_limits() -> None:
    assert limit_of(4.5, None, None, 1000) == 562
    assert limit_of(None, "80MiB", None, 1) == 80 << 20
    assert limit_of(None, None, 100 << 30, 1) == 80 << 30 and limit_of(None, None, 2 << 30, 1) == 1 << 30
    assert (size_of("1.5 GB"), size_of("700"), size_of("2k")) == (1_500_000_000, 700, 2000)
    for wrong in ("", "0", "0.1", "80ib", "-3M", "M", "1e9", "9" * 30):
        with pytest.raises(BadRecipe, match="is no size"):
            size_of(wrong)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "no budget is given"),
        (("--bpw", "4", "--fit"), "one limit"),
        (("--bpw", "0"), "0.0 bits a weight"),
        (("--bpw", "4", "--solver", "gpt"), "did you mean"),
        (("--bpw", "4", "--types", "q4_k,int4-g64"), "none of the types"),
        (("--size", "100k"), "the smallest types take"),
    ],
)
def test_refusals(
    command: Command, wide: Path, damage: Damage, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    kept, out = tmp_path / "d.json", tmp_path / "r.toml"
    damage.save(kept)
    if "q4_k,int4-g64" in words:
        words = ("--bpw", "4", "--types", "int4-g64")
    said = command("budget", wide, "-o", out, "--damage", kept, *words)
    assert said.code == 2 and reason in said.err and not out.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("q4_0", "--bpw", "4"), "two answers"),
        (("--bpw", "4", "--keep", "v"), "chooses the type"),
        (("q4_0", "--solver", "clip"), "belong to a budget"),
    ],
)
def test_quantize_refuses(command: Command, wide: Path, words: tuple[str, ...], reason: str) -> None:
    said = command("quantize", wide, *words, "-o", "never.gguf")
    assert said.code == 2 and reason in said.err


def test_what_was_not_measured_is_refused(wide: Path, damage: Damage) -> None:
    one, *_ = damage.nats
    less = Damage({n: c for n, c in damage.nats.items() if n != one}, damage.facts)
    with pytest.raises(Refused, match="nothing is known"):
        budgeted(open_source(str(wide)), less, 1_000_000)


def test_outputs(command: Command, wide: Path, damage: Damage, tmp_path: Path) -> None:
    kept, out = tmp_path / "d.json", tmp_path / "r.toml"
    damage.save(kept)
    assert "add -o" in command("budget", wide, "--bpw", "8", "--damage", kept).err
    assert "end in .toml" in command("budget", wide, "--bpw", "8", "-o", tmp_path / "r.gguf").err
    words = ("budget", wide, "--fit", "-o", out, "--damage", kept)
    said = command(*words)
    assert said.code == 0 and "of memory are free" in said.err, said.err
    assert "--force" in command(*words).err and command(*words, "--force").code == 0
    assert json.loads(kept.read_text())["kind"] == "bitmill-damage-1"
