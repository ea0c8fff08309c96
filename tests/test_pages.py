"""Pages: whole, escaped, nothing fetched, nothing run but their own script; and true to the tensors."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.core.registry import parse_grid
from bitmill.measurement.measure import Protocol, measure_all
from bitmill.measurement.report import percent
from bitmill.pages import choice, shell
from bitmill.pages.anatomy import BINS, anatomy
from bitmill.pages.beside import beside, report_of
from bitmill.pages.experts import experts
from bitmill.pages.frontier import frontier
from bitmill.pages.heat import heat
from bitmill.pages.memory import stack
from bitmill.pages.paper import on_paper
from bitmill.pages.record import Extras, page
from bitmill.source import open_source
from bitmill.sweep.front import Point, standings
from tests.test_report import EVIL, positions, record, summarize


class Tags(HTMLParser):
    """Collects tags, so that a page can be searched for what must not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.styles: list[str] = []
        self.inside: dict[str, str] = {}
        self._script = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href") or k.startswith("on")]
        self.styles += [v or "" for k, v in attrs if k == "style"]
        self._script = f"{tag} {dict(attrs).get('type', '')}".strip()
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.inside[self._script] = self.inside.get(self._script, "") + data


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


def sound(text: str) -> Tags:
    """What every page must be."""
    tags = parsed(text)
    assert tags.open == [] and tags.links == [] and tags.styles == []
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & set(tags.tags)
    assert tags.tags.count("script") == 2 and tags.tags.count("style") == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for inside in (tags.inside["style"], tags.inside["script"]):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]
    assert (
        "url(" not in text
        and "@import" not in text
        and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    )
    assert len(text.encode()) < 2_000_000 and "<script>alert" not in text
    return tags


def data_of(tags: Tags) -> Any:
    return json.loads(tags.inside["script application/json"])


def extras() -> Extras:
    panels = {f"model.layers.0.q.{EVIL}": {"shape": [1, 2], "type": EVIL}}
    memory = {"contexts": [512], "start": 0, "names": [EVIL], "bytes": {"f16": [[1]]}, "runtime": EVIL}
    speed = {"runtime": EVIL, "evidence": "modelled", "decode": {"mean": 3.0}}
    times = [(EVIL, "bar", 0.0, 3.0), ("measuring", "bar pooled", 3.0, 61.0)]
    return Extras({}, panels, memory, speed, [f"bitmill measure {EVIL}"], times)


def test_the_page_is_whole_escaped_and_fetches_nothing() -> None:
    text = page(record().to_json(), extras())
    tags = sound(text)
    assert "alert(" in text and tags.tags.count("svg") == 5 and "prefers-color-scheme: dark" in text
    found = data_of(tags)
    assert list(found["tensors"]) == [f"model.layers.0.q.{EVIL}"]
    assert len(found["heat"]["at"]) == len(found["heat"]["files"][0]) == 6


def test_the_page_survives_everything_that_may_be_missing() -> None:
    made = record()
    plain = made.to_json()
    plain |= {"floor": None, "floor_details": None, "overlap": None, "calibration": None, "same_basis": False}
    plain |= {"bpw_linears": None, "correlation": None, "ppl_se": None, "nonfinite": 0.25}
    plain["kld"] = {**plain["kld"], "ci95": None}
    sound(page(plain))
    same = record(positions=positions(0, 0.0), summary=summarize(positions(0, 0.0))).to_json()
    sound(page(same))
    broken = made.to_json()
    broken["tensors"][0]["relative"] = None
    assert 'class="cell broken"' in page(broken)
    none = {**made.to_json(), "tensors": [], "worst_tokens": []}
    sound(page(none))


def test_old_records_without_other_choices_still_make_a_page() -> None:
    plain = record().to_json()
    for token in plain["worst_tokens"]:
        del token["top_reference"], token["top_quantized"]
    sound(page(plain))


def test_a_page_holds_as_many_panels_as_there_is_room_for() -> None:
    panels = {f"tensor {i}": {"histogram": list(range(3000))} for i in range(400)}
    text = shell.page("many", "<p></p>", {"heat": {}}, panels)
    kept = data_of(sound(text))["tensors"]
    assert 50 < len(kept) < 400 and list(kept) == list(panels)[: len(kept)]


def tiers(*rows: tuple[str, int, float]) -> list[dict[str, Any]]:
    where = standings([Point(*row) for row in rows])
    return [
        {
            "name": name,
            "recipe": EVIL,
            "calibrated_on": EVIL,
            "bytes": bytes_,
            "bpw": 4.5,
            "kld": {**record().to_json()["kld"], "mean": kld, "ci95": [kld * 0.8, kld * 1.3]},
            "same_top": 0.9,
            "same_top_se": 0.01,
            "standing": where[name].to_json(),
            "speed": None,
            "seconds": {"making": 20.0, "measuring": 40.0},
        }
        for name, bytes_, kld in rows
    ]


ROWS = (
    ("Q2_K", 60_000_000, 0.4),
    ("Q4_K_M" + EVIL, 90_000_000, 0.03),
    ("Q4_0", 95_000_000, 0.05),
    ("Q8", 145_000_000, 0.001),
)


def test_the_page_of_a_choice() -> None:
    found = tiers(*ROWS)
    records = [record(name, seed=i).to_json() for i, (name, *_) in enumerate(ROWS)]
    made = choice.Choice(
        title=EVIL,
        tiers=found,
        records=records,
        weighted=[{}] * 4,
        picked=ROWS[1][0],
        budget=100_000_000,
        remarks=[EVIL],
        differences=[("a", "b", EVIL)],
        commands=["bitmill sweep"],
    )
    text = choice.page(made)
    tags = sound(text)
    told = data_of(tags)
    assert told["files"][0] == ROWS[1][0] and len(told["heat"]["files"]) == 4
    assert "beaten by Q4_K_M" in text and text.count('class="spot') == 4 and 'class="spot knee' in text
    assert "budget 100.0 MB" in text and "noise floor" in text


def test_the_picture_of_the_front_is_an_svg_file() -> None:
    for rows in (ROWS, ROWS[:1], (("zero", 10, 0.0), ("one", 10, 0.5))):
        plain = tiers(*rows)
        if rows[0][0] == "zero":
            plain[0]["kld"]["ci95"] = None
        for floor, budget in ((1e-5, 70_000_000), (None, None)):
            root = ElementTree.fromstring(on_paper(frontier(plain, floor, budget)))
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            spots = [e for e in root.iter() if (e.get("class") or "").startswith("spot")]
            assert len(spots) == len(rows)
            for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
                assert 0 <= float(circle.get("cx") or -1) <= 880 and 0 <= float(circle.get("cy") or -1) <= 400


def test_labels_of_the_front_do_not_cover_each_other() -> None:
    near = tiers(*((f"Q{i}_K_M", 60_000_000 + i * 900_000, 0.4 / (i + 1)) for i in range(8)))
    root = ElementTree.fromstring(on_paper(frontier(near, None, None)))
    labels = [e for e in root.iter() if (e.get("class") or "").startswith("label")]
    places = {(round(float(e.get("x") or 0)), round(float(e.get("y") or 0))) for e in labels}
    assert len(places) == len(labels) == 8


@pytest.mark.parametrize(
    "grid", ["q4_0", "q8_0", "q4_1", "q6_k", "q4_k", "int4-g32-asym", "int3-g64-sym", "nf4-b64", "mxfp4"]
)
def test_the_arithmetic_of_a_block_gives_the_stored_value(grid: str) -> None:
    w = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    stored = parse_grid(grid).round(w)
    found = anatomy(stored, w)
    block = found["block"]
    dense = stored.dense()
    assert found["worst"][0]["row"] == block["row"] and len(block["after"]) == len(block["made"]) == 32
    for i, (value, said) in enumerate(zip(block["after"], block["made"], strict=True)):
        exact = float(dense[block["row"], block["column"] + i])
        assert value == pytest.approx(exact, rel=1e-5)
        arithmetic = said.replace("×", "*").replace("−", "-")
        assert re.fullmatch(r"[\d.e+*() -]+", arithmetic), said
        assert eval(arithmetic) == pytest.approx(exact, rel=2e-3, abs=1e-4), said  # noqa: S307
    assert block["alike"] > 0 and len(block["points"]) > 1 if grid != "q8_0" else not block["points"]
    for value in block["after"][: block["alike"]]:
        assert min(abs(value - point) for point in block["points"]) < 1e-4
    histogram = found["histogram"]
    assert sum(histogram["before"]) == sum(histogram["after"]) == histogram["weights"] == w.numel()
    assert len(histogram["after"]) <= BINS and found["scales"]["counts"]
    wrong = (dense - w).square().view(24, 8, 32).sum(-1) / w.square().view(24, 8, 32).sum(-1)
    assert found["worst"][0]["relative"] == pytest.approx(math.sqrt(float(wrong.max())), rel=1e-4)


def test_after_bars_stand_on_codes() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    found = anatomy(parse_grid("int3-g64-sym").round(w), w)["histogram"]
    width = len(found["after"]) // 8
    lit = [i for i, count in enumerate(found["after"]) if count]
    assert len(lit) <= 8 and len({i % width for i in lit}) == 1, "one bar a code, in its middle"


def test_a_real_file_from_inside(tiny_llama: Path, tmp_path: Path) -> None:
    import bitmill

    text = tmp_path / "words.txt"
    text.write_text("".join(f"{i} green bottles and {i * 3} brown ones.\n" for i in range(200)))
    out = tmp_path / "small.gguf"
    bitmill.quantize(str(tiny_llama), "Q4_0", out)
    reference = open_source(str(tiny_llama))
    made = measure_all([str(out)], reference, texts=[str(text)], protocol=Protocol(window=32, count=2))[0]
    plain = made.to_json()
    more = beside(plain, out, reference, ["bitmill quantize"])
    assert len(more.panels) == 21 and more.memory is not None and report_of(out)["path"] == str(out)
    told = data_of(sound(page(plain, more)))
    cell = next(c for c in told["heat"]["files"][0] if c is not None)
    row = next(r for r in plain["tensors"] if r["name"] == cell[0])
    assert percent(cell[3]) == percent(row["relative"]) and cell[1] == row["grid"]
    weights = more.memory["bytes"]["f16"][0][more.memory["names"].index("weights")]
    assert 0 < weights <= out.stat().st_size and stack(tmp_path / "nothing") is None
    assert heat([{**plain, "tensors": []}], [{}]) == ("", {})


def run_report(blocks: int, count: int, **more: Any) -> dict[str, Any]:
    """A run's report of a mixture: expert 1 of each block was sent nothing."""
    sent = [0 if e == 1 else 10 * e + 5 for e in range(count)]
    rows = [{"block": b, "sent": sent, "shown": sent, "experts": list(range(count))} for b in range(blocks)]
    lost = [
        f"model.layers.{b}.mlp.experts.1.{n}.weight" for b in range(blocks) for n in ("gate", "up", "down")
    ]
    notes = [{"kind": "no-importance", "where": "+".join(lost[i : i + 2])} for i in range(0, len(lost), 2)]
    return {"experts": {"blocks": rows}, "notes": notes, **more}


def test_the_map_of_experts_names_who_saw_nothing() -> None:
    text = page(record().to_json(), Extras(report=run_report(2, 8)))
    tags = sound(text)
    assert "0 to 75, median 45; 2 experts had none." in text
    assert text.count("block 0, expert 3, sent 35<") == 1 and tags.tags.count("svg") == 5
    drawn = re.search('<g class="broken"[^>]*>(.*?)</g>', text)
    assert drawn is not None and drawn[1].count("<rect") == 2 and "block 1, expert 1, sent 0<" in drawn[1]
    assert "6 weights had no data" in text and "model.layers.1.mlp.experts.1: gate, up and down<" in text


def test_the_map_says_what_is_not_known() -> None:
    told = run_report(1, 8)
    told["experts"]["blocks"][0]["sent"] = [None] * 8
    assert "that each expert was placed by" in experts(told) and "expert 3, placed by 35<" in experts(told)
    more = run_report(1, 8)
    more["experts"]["blocks"][0]["shown"] = [80] * 8
    assert "more than they are sent: 80 at least" in experts(more) and "sent 35, placed by 80<" in experts(
        more
    )
    without = {"notes": run_report(1, 8)["notes"]}
    assert "Weights without data" in experts(without) and "<svg" not in experts(without)
    assert "Every weight had data." in experts({**run_report(1, 8), "notes": []}) and experts({}) == ""


def test_large_mixtures_fit_and_hostile_reports_do_no_harm() -> None:
    assert len(experts(run_report(61, 256))) < 500_000 and len(experts(run_report(48, 128))) < 800_000
    row = {"block": 1, "sent": [1], "shown": [1]}
    wrong = ({"block": EVIL}, {"sent": [], "shown": []}, {"shown": [-1]}, {"sent": [1.5]}, {"sent": [1, 2]})
    assert experts({"experts": {"blocks": [row]}})
    for rows in (7, [7], *([{**row, **change}] for change in wrong)):
        assert experts({"experts": {"blocks": rows}, "notes": [7, {"kind": "no-importance"}]}) == ""
    evil = [{"kind": "no-importance", "where": f"{EVIL}{i}.weight"} for i in range(300)]
    sound(page(record().to_json(), Extras(report={**run_report(2, 4), "notes": evil})))
