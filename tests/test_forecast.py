"""What a run is said to take: blocks that are timed for real, and the room it needs on disk."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bitmill import mill
from bitmill.calibrate.moments import load_moments
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.forecast import DISK
from bitmill.planning import Plan, plan
from bitmill.recipe import parse
from bitmill.source import open_source
from bitmill.timing import first_rows, timed
from tests.tiny import make_model, tokens

WINDOWS = {"nsamples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    folder = make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=6, **sizes)
    return open_source(str(folder))


def made(line: str, source: Checkpoint) -> Plan:
    return plan(parse(line), source, **WINDOWS)


@pytest.mark.parametrize("line", ["gptq : int4-g32-sym > gptq", "nearest : q4_0 > gguf"])
def test_the_first_blocks_stand_for_the_rest(line: str, source: Checkpoint, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    wanted = made(line, source)
    found = timed(wanted, source, scratch=tmp_path, tell=lambda e, d, n, _: heard.append((e, d, n)))
    assert found.of == 6 and len(found.blocks) == 2 and found.said == "2 of 6 blocks timed"
    first, second = found.blocks
    whole = found.outside + first + 5 * second + wanted.bytes_ / DISK
    assert found.seconds == pytest.approx(whole) and min(found.outside, first, second) > 0
    assert heard[-1] == ("timing", 2, 2) and list(tmp_path.iterdir()) == []


def test_a_block_of_each_kind_is_timed(source: Checkpoint) -> None:
    wanted = made("nearest : Q4_K_M", source)
    rows, kinds = first_rows(wanted)
    assert len(kinds) == 6 and len(set(kinds)) == 2, "this mixture has blocks of two kinds"
    blocks = {layer: {str(r.grid) for r in rows if r.layer == layer} for layer in range(3)}
    later = {str(r.grid) for r in wanted.rows if r.layer == 2}
    assert all(blocks.values()) and later in blocks.values()
    assert not [r for r in rows if r.layer is not None and r.layer > 2]
    found = timed(wanted, source)
    assert len(found.blocks) == 3


def test_known_moments_need_no_text(source: Checkpoint, tmp_path: Path) -> None:
    mill.quantize(
        source, "clip : q4_0", tmp_path / "a.gguf", calib=tokens(4, 32), save=tmp_path / "m.safetensors"
    )
    known, _ = load_moments(tmp_path / "m.safetensors")
    assert timed(made("clip : q4_0", source), source, known).seconds > 0


def test_what_goes_through_the_whole_model_is_not_timed(source: Checkpoint) -> None:
    with pytest.raises(Refused, match="whole model"):
        timed(made("gptq + tune(steps=2) : int4-g32-sym > gptq", source), source)


def test_more_text_takes_longer_and_at_last_no_more_memory_inside_a_block(source: Checkpoint) -> None:
    counts = (64, 128, 1024, 4096)
    taken = [plan(parse("gptq : int4-g32-sym > gptq"), source, nsamples=n, seqlen=512) for n in counts]
    assert all(one.seconds < other.seconds for one, other in pairwise(taken))
    hidden = [2 * n * 512 * 256 * 4 for n in counts]
    inside = [made.peak_bytes - kept for made, kept in zip(taken, hidden, strict=True)]
    assert inside[0] < inside[1], "all tokens are inside a block at once"
    assert inside[2] == inside[3] < inside[1], "as many as go through at once, however many there are"


def test_a_refused_shape_names_the_groups_that_would_divide_it(source: Checkpoint) -> None:
    with pytest.raises(Refused, match="groups of 256, if the grid has them; or say what"):
        plan(parse("nearest : int4-g512-sym > compressed-tensors"), source)


@pytest.mark.parametrize("line", ["gptq : q4_0 > gguf", "gptq(asymmetric=0.5) : q4_0 > gguf", "q8_0"])
def test_a_run_takes_the_disk_that_its_plan_says(line: str, source: Checkpoint, tmp_path: Path) -> None:
    seen: list[int] = []

    def look(_: str) -> None:
        seen.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))

    wanted = made(line, source)
    assert wanted.to_json()["disk_bytes"]["value"] == wanted.disk_bytes >= wanted.bytes_
    calib = tokens(4, 32) if wanted.calibrates else None
    mill.quantize(source, line, tmp_path / "out.gguf", calib=calib, boundary=look)
    journal = 200_000
    assert wanted.disk_bytes * 0.9 <= max(seen) <= wanted.disk_bytes + journal
