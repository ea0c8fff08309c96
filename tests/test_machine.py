"""Machines: in words, as found by drivers, and the table of cards; the model of the cliff on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bitmill.advise.cache_types import cache_types
from bitmill.advise.cliff import CARD_SHARE, RAM_SHARE, Cliff, cliff, ram_speed, shown
from bitmill.advise.detect import cards, processor, read_bandwidth
from bitmill.advise.hardware import every_card, find_card, known_card
from bitmill.advise.machine import Machine, here, machine
from bitmill.advise.memory import Model, Wanted, memory
from bitmill.advise.runtimes import RUNTIMES
from bitmill.advise.shape import Kept, Shape
from bitmill.advise.weights import Weights, parted
from bitmill.core.errors import Refused
from bitmill.measurement.cliff import cliff_svg

GIB = 1 << 30
F16 = cache_types("f16")


def none(words: Sequence[str]) -> str:
    """A machine on which no command answers."""
    return ""


@pytest.mark.parametrize(
    ("text", "ram", "vram", "card", "speed"),
    [
        ("rtx4090 + 64GB ddr5", 64 * 10**9, 24 * GIB, "rtx4090", 89.6e9),
        ("RTX 4060 Ti 8GB, 32GB DDR4-3600", 32 * 10**9, 8 * GIB, "rtx4060ti", 57.6e9),
        ("2x rtx 3090 + 256GB 8x ddr4", 256 * 10**9, 48 * GIB, "rtx3090", 204.8e9),
        ("nvidia a100 40gb", 0, 40 * GIB, "a100", 0),
        ("vram=24GB + 64GB ddr5-6000 + 12 cores", 64 * 10**9, 24 * 10**9, "a card", 96e9),
        ("64GB", 64 * 10**9, 0, None, 0),
        ("4090", 0, 24 * GIB, "rtx4090", 0),
    ],
)
def test_machines_in_words(text: str, ram: int, vram: int, card: str | None, speed: float) -> None:
    found = machine(text)
    assert (found.ram_bytes, found.vram_bytes) == (ram, vram)
    assert found.ram_bandwidth == pytest.approx(speed) and not found.measured
    assert [c.name for c in found.cards[:1]] == ([card] if card else [])
    assert found.cores == (12 if "cores" in text else 0)


def test_shared_memory_is_one_place_and_not_all_of_it() -> None:
    large, small = machine("M2 Max 64GB"), machine("m2 16gb")
    assert large.unified and large.places == (("unified", 48 * GIB),) and large.vram_bytes == 0
    assert small.places == (("unified", round(16 * GIB * 2 / 3)),)
    assert machine("raspberry pi 5").cores == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rtx4091", "rtx4090"), ("rtx4090 48GB", "not made with"), ("rtx4090 + vram=8GB", "names a card"),
        ("m2max + 64GB", "one memory"), ("64GB ddr9", "not in the table"),
        ("gtx 9000 + 8GB", "not in the table"),
        ("8 cores", "describes no machine"), ("rtx4090 + rtx3090", "twice"), ("", "describes no machine"),
    ],
)  # fmt: skip
def test_what_describes_no_machine(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        machine(text)
    assert "try:" in str(refused.value)


def test_every_row_of_the_table_has_its_source_and_makes_sense() -> None:
    found = every_card()
    assert len(found) > 50
    for card in found:
        assert re.search(r"20\d\d; .*20\d\d", card.source), card.name
        assert 4e9 * 0.6 < card.bytes_ < 600e9 and 1e10 < card.bandwidth <= 8e12, card.name
        assert 0 <= card.flops < 3e15 and card.formats and (card.unified or card.bus > 1e10), card.name
    assert "fp4" in find_card("rtx5090").formats and "fp8" not in find_card("a100").formats  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("driver", "name", "bandwidth"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090", 1008e9), ("NVIDIA A100-SXM4-80GB", "a100", 2039e9),
        ("NVIDIA A100-PCIE-40GB", "a100", 1555e9), ("NVIDIA H100 80GB HBM3", "h100", 3350e9),
        ("NVIDIA H100 PCIe", "h100pcie", 2000e9), ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada", 960e9),
        ("AMD Radeon RX 7900 XTX", "rx7900xtx", 960e9), ("Apple M3 Ultra", "m3ultra", 819e9),
    ],
)  # fmt: skip
def test_what_drivers_call_them(driver: str, name: str, bandwidth: float) -> None:
    card = known_card(driver)
    assert card is not None and (card.name, card.bandwidth) == (name, bandwidth)


@pytest.mark.parametrize("driver", ["NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla K80", "AMD Radeon Graphics"])
def test_what_is_not_in_the_table_is_not_guessed(driver: str) -> None:
    assert known_card(driver) is None


def test_cards_as_drivers_tell_of_them(tmp_path: Path) -> None:
    said = "NVIDIA GeForce RTX 3090, 23900\nNVIDIA Mystery 9, 8000\n"
    first, second = cards(lambda words: said if words[0] == "nvidia-smi" else "", tmp_path)
    assert (
        first.bytes_ == 23_900 << 20 and first.bandwidth == 936e9 and first.name == "NVIDIA GeForce RTX 3090"
    )
    assert second.bytes_ == 8000 << 20 and second.bandwidth == 0 and not second.unified
    device = tmp_path / "card1" / "device"
    device.mkdir(parents=True)
    for name, value in (("vram_total", 16 * GIB), ("vram_used", GIB)):
        (device / f"mem_info_{name}").write_text(f"{value}\n")
    (amd,) = cards(none, tmp_path)
    assert amd.bytes_ == 15 * GIB
    assert cards(lambda words: "No devices were found", tmp_path / "none") == ()


def test_the_processor_within_its_limits(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: A Processor\nflags\t\t: sse avx2 fma avx512f\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    found = processor(tmp_path / "cpuinfo", tmp_path)
    assert (found.name, found.features, found.cores) == ("A Processor", ("avx2", "fma", "avx512f"), 1)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processor(tmp_path / "nowhere", tmp_path).cores >= 1


def test_this_machine() -> None:
    found = here(fast=True)
    assert found.cores >= 1 and found.disk_bytes > 0 and found.ram_bandwidth == 0 and not found.measured
    assert read_bandwidth(1 << 20, 1) > 0
    assert found.to_json()["ram_bytes"] == found.ram_bytes


def dense(blocks: int = 32, block_bytes: int = 130_000_000, experts: int = 0, used: int = 0) -> Model:
    """A model of 8B's widths, 4.5 GB, or of as many blocks as are said, or a mixture of that size."""
    shape = Shape(
        "x", (Kept(1024, 1024, 128, 128),) * blocks, 4096, 14_336, 4096, 128_256, 131_072, experts, used
    )
    routed = (block_bytes * 9 // 10,) * blocks if experts else (0,) * blocks
    weights = Weights(
        blocks * block_bytes + 700_000_000, 300_000_000, 400_000_000, (block_bytes,) * blocks, routed
    )
    return Model(shape, weights, RUNTIMES["llama.cpp"])


def run(model: Model, text: str, context: int = 8192, parallel: int = 1) -> Cliff:
    return cliff(model, Wanted(context, parallel, F16), machine(text))


def test_all_of_it_on_the_card_is_what_memory_says() -> None:
    found, wanted = run(dense(), "rtx4090 + 64GB ddr5"), Wanted(8192, 1, F16)
    assert found.best is not None and found.best.whole and found.most == found.splits[-1]
    assert found.best.card_bytes == memory(dense(), wanted, "vram").bytes_
    read = 32 * 130e6 + 400e6 + 8192 * 32 * 2048 * 2
    low, high = (1008e9 * share / read for share in CARD_SHARE)
    assert found.best.decode[0] == pytest.approx(low, rel=0.2)
    assert found.best.decode[1] == pytest.approx(high, rel=0.2)


def test_without_a_card_main_memory_decides() -> None:
    found = run(dense(), "64GB ddr5 + 16 cores")
    (only,) = found.splits
    assert found.best == only and only.layers == 0 and only.card_bytes == 0
    assert only.ram_bytes == memory(dense(), Wanted(8192, 1, F16), "ram").bytes_
    read = 32 * 130e6 + 400e6 + 8192 * 32 * 2048 * 2
    assert only.decode[1] == pytest.approx(89.6e9 * RAM_SHARE[1] / read, rel=0.05)
    assert run(dense(), "2GB").best is None


def test_few_cores_are_slower_than_memory() -> None:
    assert ram_speed(machine("64GB ddr5 + 2 cores"), 1) == 16e9
    measured = replace(machine("64GB ddr5 + 64 cores"), ram_bandwidth=20e9, measured=True)
    assert ram_speed(measured, 1) == 20e9 and ram_speed(measured, 0) == pytest.approx(12e9)


def test_every_layer_beside_the_card_costs_and_the_first_the_most() -> None:
    splits = run(dense(), "rtx4090 + 64GB ddr5").splits
    rates = [split.decode[1] for split in splits]
    assert len(splits) == 33 and rates == sorted(rates)
    steps = [after - before for before, after in pairwise(rates)]
    assert steps[-1] == max(steps) and rates[-1] > 5 * rates[0]
    assert all(a.card_bytes < b.card_bytes for a, b in pairwise(splits))


def test_what_has_no_room_is_beside_it() -> None:
    found = run(dense(), "vram=4GB + 64GB ddr5")
    assert found.most is not None and 0 < found.most.layers < 32
    assert found.most.card_bytes <= 4e9 < found.splits[found.most.layers + 1].card_bytes
    assert found.to_json()["layers_that_fit"] == found.most.layers
    assert run(dense(), "vram=4GB").best is None, "no main memory was named for the rest"


def test_one_memory_has_no_cliff() -> None:
    found = run(dense(), "m2max 64GB")
    (only,) = found.splits
    assert only.whole and only.ram_bytes == 0
    assert only.card_bytes == memory(dense(), Wanted(8192, 1, F16), "unified").bytes_
    assert run(dense(200), "m2 8GB").best is None


def test_weights_that_stream_are_slower_than_those_computed_beside() -> None:
    streamed = replace(dense(), runtime=RUNTIMES["transformers"])
    assert run(streamed, "rtx4090 + 64GB 8x ddr5").splits[0].layers == 0
    half = [run(m, "rtx4090 + 256GB 8x ddr5 + 32 cores").splits[16].decode[1] for m in (dense(), streamed)]
    assert half[1] < half[0]
    assert (
        len(cliff(replace(dense(), runtime=RUNTIMES["mlx"]), Wanted(512, 1, F16), machine("rtx4090")).splits)
        == 1
    )


def test_experts_alone_beside_the_card() -> None:
    """A mixture larger than the card: all but experts on it is faster than whole blocks beside it."""
    mixture = dense(48, 400_000_000, experts=128, used=8)
    found = run(mixture, "rtx3060 + 64GB ddr5")
    assert found.most is not None and found.experts is not None and found.best == found.experts
    assert found.experts.experts_off and found.experts.decode[0] > found.most.decode[0]
    dense_one = run(dense(48, 400_000_000), "rtx3060 + 64GB ddr5").best
    assert dense_one is not None and found.best.decode[0] > 4 * dense_one.decode[0]


def test_many_sequences_read_weights_once_and_more_experts() -> None:
    one, eight = (run(dense(), "h100", 2048, n).splits[-1].decode[1] for n in (1, 8))
    assert one > eight > 0.5 * one
    mixture = dense(48, 400_000_000, experts=128, used=8)
    one, eight = (run(mixture, "h100", 2048, n).splits[-1].decode[1] for n in (1, 8))
    assert eight < 0.5 * one


def test_a_longer_prompt_takes_longer() -> None:
    short, long = (run(dense(), "rtx4090", n).splits[-1].prefill for n in (2048, 16_384))
    assert short is not None and long is not None and long[1] > 8 * short[1] and short[0] > short[1]
    assert run(dense(), "vram=24GB").splits[-1].prefill is None, "nothing is known of its arithmetic"


def test_parts_by_name() -> None:
    sizes = {
        "token_embd.weight": 7, "output.weight": 5, "blk.0.attn_q.weight": 1, "blk.1.ffn_up_exps.weight": 3,
        "blk.1.ffn_gate_inp.weight": 1,
    }  # fmt: skip
    assert parted(sizes) == (5, (1, 4), (0, 3))
    assert parted({"model.embed_tokens.weight": 9, "model.layers.0.mlp.experts.7.up_proj.weight": 2}) == (
        9, (2,), (2,)
    )  # fmt: skip


def test_ranges_are_said_with_few_digits() -> None:
    assert shown((58.4, 31.2)) == "31 to 58" and shown((0.123, 2.34), " s") == "0.12 to 2.3 s"
    assert shown((1000.2, 1000.4)) == "1,000"


def test_the_plot_is_well_formed_and_escaped() -> None:
    found = run(dense(), "vram=4GB + 64GB ddr5")
    record = {
        "runtime": "<b>", "context": 8192, "machine": {"said": 'a & "b"'}, "speed": found.to_json(),
    }  # fmt: skip
    drawn = cliff_svg(record)
    root = ElementTree.fromstring(drawn)
    kinds = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert kinds.count("polygon") == 1 and kinds.count("polyline") == 2 and "script" not in kinds
    points = root.find(".//{http://www.w3.org/2000/svg}polyline").get("points")  # type: ignore[union-attr]
    assert len(str(points).split()) == 33 and "room for" in drawn and "<b>" not in drawn


def test_a_machine_of_memory_alone_is_as_it_was() -> None:
    assert Machine(8, 0, "x").places == (("ram", 8),) and not Machine(8, 0, "x").unified
