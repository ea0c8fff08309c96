"""Sweeps: names and places, the front, what is kept of the original, and going on where it was."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.core.errors import BadRecipe, Interrupted, Refused
from bitmill.measurement.measure import Protocol, measure_all
from bitmill.measurement.states import Kept, States
from bitmill.recipe import parse
from bitmill.sweep import errand, run
from bitmill.sweep.errand import Drawn, Measuring
from bitmill.sweep.front import Point, largest_within, standings
from bitmill.sweep.result import kept, losses_path, result_path
from bitmill.sweep.tiers import LADDERS, stem, takes_matrix, tiers
from bitmill.sweep.workers import abroad, on_ray, refuse_cluster

PROTOCOL = Protocol(window=32, count=2)
RECIPES = ("Q8_0", "Q4_0", "nearest : int4-g32 > gptq")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall, {i * i} of them green.\n" for i in range(200)))
    return path


def asked(model: Path, folder: Path, text: Path, *recipes: str, **changes: Any) -> run.Asked:
    drawn = Drawn((str(text),), nsamples=4, seqlen=32)
    measuring = Measuring((str(text),), PROTOCOL, Kept(folder / ".sweep" / "original"))
    return run.Asked(str(model), recipes or RECIPES, folder, drawn, measuring, **changes)


def swept(wanted: run.Asked, **more: Any) -> run.Outcome:
    return run.sweep(wanted, run.prospect(wanted), **more)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("model-IQ3_XXS.gguf", "model"),
        ("model-BF16-00001-of-00003.gguf", "model"),
        ("Qwen3-0.6B", "Qwen3-0.6B"),
        ("big.f16.gguf", "big"),
    ],
)
def test_outputs_are_named_after_the_model(name: str, said: str) -> None:
    assert stem(Path(name)) == said


def test_every_rung_of_every_ladder_is_a_recipe() -> None:
    assert len(LADDERS["gguf"]) == 10
    for names in LADDERS.values():
        found = tiers(Path("m"), names)
        assert len(found) == len({tier.file for tier in found}) == len(names)


def test_places() -> None:
    found = tiers(Path("a/m.gguf"), ("Q4_K_M", "q4_k_m", "nearest : int4-g32 > gptq", "gptq:int4-g32>gptq"))
    assert [t.file for t in found] == ["m-Q4_K_M.gguf", "m-nearest-int4-g32-gptq", "m-gptq-int4-g32-gptq"]
    assert tiers(Path("m"), ["nearest : q4_0 > gguf", "nearest:q4_0>gguf"])[1:] == ()
    with pytest.raises(BadRecipe, match="no recipe"):
        tiers(Path("m"), ())
    assert takes_matrix(parse("IQ2_XS")) and not takes_matrix(parse("gptq : q4_0 > gguf"))
    assert not takes_matrix(parse("nearest : int4-g32 > gptq"))


def test_the_front_its_knee_and_what_is_beaten() -> None:
    points = [
        Point("q2", 50, 0.5),
        Point("q3", 60, 0.12),
        Point("old", 64, 0.2),
        Point("q4", 75, 0.03),
        Point("twin", 75, 0.03),
        Point("q8", 140, 0.01),
    ]
    found = standings(points, lambda one, other: (0.01, 0.1) if one == "old" else None)
    assert [p.name for p in points if found[p.name].front] == ["q2", "q3", "q4", "twin", "q8"]
    assert found["old"].beaten_by == "q3" and found["old"].settled
    assert [n for n, where in found.items() if where.knee] == ["q4"]
    best = largest_within(points, 70)
    assert best is not None and best.name == "q3" and largest_within(points, 10) is None
    chance = standings(points[1:3], lambda *_: (-0.1, 0.3))["old"]
    assert chance.settled is False and not any(w.knee for w in standings(points[:2]).values())


def test_states_are_kept_within_their_bytes_and_damage_is_no_harm(tmp_path: Path) -> None:
    store = Kept(tmp_path, 9000)
    states = States(torch.randn(2, 10, 50), {"kld": 1e-5})
    for model in "abc":
        store.write({"model": model}, states, seed=3)
    shape = (2, 10, 50)
    assert store.read({"model": "a"}, shape, 3) is None, "the oldest made room"
    found = store.read({"model": "c"}, shape, 3)
    assert found is not None and torch.equal(found.hidden, states.hidden) and found.floor == {"kld": 1e-5}
    other = store.read({"model": "c"}, shape, 4)
    assert other is not None and other.floor is None, "a floor belongs to its seed"
    assert store.read({"model": "c"}, (2, 10, 49), 3) is None
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert store.read({"model": "c"}, shape, 3) is None
    Kept(tmp_path / "none", 10).write({}, states, 0)
    assert not (tmp_path / "none").exists(), "what is too large is not kept"


def test_kept_states_measure_the_same_to_the_last_bit(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    wanted = asked(tiny_llama, tmp_path / "s", text, "Q4_0")
    swept(wanted)
    file = str(tmp_path / "s" / tiers(tiny_llama, ["Q4_0"])[0].file)
    how: dict[str, Any] = {"texts": [str(text)], "protocol": PROTOCOL}
    plain = measure_all([file], str(tiny_llama), **how)[0].to_json()
    again = measure_all([file], str(tiny_llama), **how, kept=wanted.measuring.kept)[0].to_json()
    assert len(list((tmp_path / "s" / ".sweep" / "original").iterdir())) == 1
    for one in (plain, again):
        one.pop("seconds")
    assert plain == again
    top = plain["worst_tokens"][0]
    assert len(top["top_reference"]) == 5 and top["top_reference"][0][0] == top["reference"]
    assert top["top_quantized"][0][0] == top["quantized"]


def test_a_sweep_makes_measures_and_weighs(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    made = swept(asked(tiny_llama, tmp_path / "s", text, budget=10**9))
    plain = json.loads(run.write(made).read_text(encoding="utf-8"))
    assert {t["name"] for t in plain["tiers"]} == {"Q8_0", "Q4_0", "nearest-int4-g32-gptq"}
    told = {t["name"]: t["calibrated_on"] for t in plain["tiers"]}
    assert told == {
        "Q8_0": "importance matrix",
        "Q4_0": "importance matrix",
        "nearest-int4-g32-gptq": "text",
    }
    assert plain["best_within_budget"] == "Q8_0" and plain["floor"] > 0
    assert [t["bytes"] for t in plain["tiers"]] == sorted(t["bytes"] for t in plain["tiers"])
    assert all(n["kld_difference_ci95"] for n in plain["neighbours"])
    for result in made.results:
        alone = measure_all(
            [str(tmp_path / "s" / result.file)], str(tiny_llama), texts=[str(text)], protocol=PROTOCOL
        )[0]
        assert alone.to_json()["kld"] == result.record["kld"]


def test_a_sweep_goes_on_where_it_was(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = asked(tiny_llama, tmp_path / "s", text)

    def stop(event: str, done: int, total: int, said: str) -> None:
        if event == "tier" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        swept(wanted, progress=stop)
    begun: list[str] = []
    carry = errand.carry
    monkeypatch.setattr("bitmill.sweep.workers.carry", lambda e, p: begun.append(e.name) or carry(e, p))
    heard: list[str] = []
    whole = swept(wanted, note=heard.append)
    assert len(begun) == 2 and "1 of 3 tiers" in heard[0] and len(whole.results) == 3
    begun.clear()
    again = swept(wanted)
    assert not begun and again.to_json()["tiers"] == whole.to_json()["tiers"]
    longer = replace(wanted, measuring=replace(wanted.measuring, protocol=replace(PROTOCOL, count=3)))
    stamps = {r.file: (tmp_path / "s" / r.file).stat().st_mtime_ns for r in whole.results}
    swept(longer)
    assert len(begun) == 3, "other windows are other numbers"
    assert stamps == {r.file: (tmp_path / "s" / r.file).stat().st_mtime_ns for r in whole.results}


def test_a_result_that_is_damaged_is_made_again(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    wanted = asked(tiny_llama, tmp_path / "s", text, "Q8_0", "Q4_0")
    made = swept(wanted)
    first, second = made.results
    path = result_path(wanted.folder, first.file)
    for broken in (b"", b"[]", b'{"name": 1}', path.read_bytes()[:-40]):
        path.write_bytes(broken)
        assert kept(wanted.folder, first.file, first.key, first.bytes_) is None
    losses_path(wanted.folder, second.file).write_bytes(b"no tensors")
    again = swept(wanted)
    assert [r.key for r in again.results] == [r.key for r in made.results]
    assert again.pairs[0][2] is None, "without its positions there is no paired interval"


def test_what_a_model_cannot_have(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    impossible = "nearest : int4-g96 > gptq"
    with pytest.raises(Refused, match="96"):
        run.prospect(asked(tiny_llama, tmp_path / "s", text, "Q8_0", impossible))
    found = run.prospect(asked(tiny_llama, tmp_path / "s", text, "Q8_0", impossible, forgiving=True))
    assert [p.tier.name for p in found.placed] == ["Q8_0"] and "96" in found.left[0].why
    with pytest.raises(Refused, match="none of 1"):
        run.prospect(asked(tiny_llama, tmp_path / "s", text, impossible, forgiving=True))
    assert not (tmp_path / "s").exists(), "nothing is written before work begins"


def test_somebody_elses_files_stay(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    wanted = asked(tiny_llama, folder, text, "Q8_0", importance=False)
    file = folder / tiers(tiny_llama, ["Q8_0"])[0].file
    file.write_bytes(b"mine")
    with pytest.raises(Refused, match="exists"):
        swept(wanted)
    assert file.read_bytes() == b"mine"
    (folder / run.MATRIX).write_bytes(b"mine, too")
    with pytest.raises(Refused, match="no sweep made it"):
        swept(replace(wanted, importance=True))
    assert swept(replace(wanted, importance=True, force=True)).results[0].told == "importance matrix"


def test_tiers_that_share_a_solution_share_an_errand(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    recipes = ("gptq : int4-g32-sym > gptq", "Q8_0", "gptq : int4-g32-sym > bitmill")
    made = swept(asked(tiny_llama, tmp_path / "s", text, *recipes))
    klds = {r.name: r.kld for r in made.results}
    assert klds["gptq-int4-g32-sym-gptq"] == pytest.approx(klds["gptq-int4-g32-sym-bitmill"], rel=0.05)


def test_processes_make_the_same(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    one = swept(asked(tiny_llama, tmp_path / "one", text, "Q8_0", "Q4_0"))
    two = swept(asked(tiny_llama, tmp_path / "two", text, "Q8_0", "Q4_0", jobs=2))
    for a, b in zip(one.results, two.results, strict=True):
        assert (tmp_path / "one" / a.file).read_bytes() == (tmp_path / "two" / b.file).read_bytes()
        assert a.kld == pytest.approx(b.kld, rel=1e-4)


def test_errands_for_other_machines_name_paths_in_full(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    measuring = Measuring(("wikitext", tiny_llama.name), PROTOCOL, Kept(Path("out") / "kept"))
    drawn = Drawn((f"{tiny_llama.name}=2",))
    tier = tiers(tiny_llama, ["Q4_0"])
    out = Path("out")
    one = errand.Errand(tiny_llama.name, None, out, tier, ("k",), (1,), out / "m", drawn, measuring, "text")
    far = abroad(one)
    here = Path.cwd()
    assert (far.model, far.folder, far.matrix) == (str(here / one.model), here / "out", here / "out" / "m")
    assert far.drawn.calib == (f"{here / one.model}=2",)
    assert far.measuring.texts == ("wikitext", str(here / one.model))
    assert far.measuring.kept.folder == here / "out" / "kept" and far.tiers == one.tiers


def test_without_ray_the_option_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refused, match="pip install ray"):
        next(on_ray([], "local"))


def test_a_cluster_that_does_not_answer_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", object())
    with pytest.raises(Refused, match="no Ray cluster at '127.0.0.1:1'"):
        next(on_ray([], "127.0.0.1:1"))
    for here in ("local", "local:2", "auto"):
        refuse_cluster(here)
