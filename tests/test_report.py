"""What people read: terminal, page and comparison; numbers with honest digits, and nothing from a model
unescaped."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bitmill.core.errors import Refused
from bitmill.core.types import Note
from bitmill.measurement import report
from bitmill.measurement.compare import compare, mcnemar
from bitmill.measurement.logits import Positions, summarize
from bitmill.measurement.record import Record, Side
from bitmill.measurement.tensors import TensorError, TensorTable

EVIL = "<script>alert('x')</script>&\"[bold red]"


def positions(seed: int, scale: float = 0.05, count: int = 320) -> Positions:
    rng = np.random.default_rng(seed)
    kld = scale * rng.gamma(0.5, 2.0, count)
    nll = rng.exponential(2.0, count)
    target = np.arange(count) % 7
    top = np.where(rng.random(count) < 0.6, target, 9)
    return Positions(
        kld=kld,
        nll=nll + rng.normal(0, 0.1, count),
        nll_reference=nll,
        top=top,
        top_reference=np.where(rng.random(count) < 0.9, top, 8),
        confidence=rng.random(count),
        target=target,
        window=np.arange(count) // 20,
        place=16 + np.arange(count) % 20,
        finite=np.ones(count, bool),
    )


def record(name: str = "file.gguf", seed: int = 0, scale: float = 0.05, **changes: Any) -> Record:
    p = positions(seed, scale)
    kinds = ("docs", EVIL) * 8
    stratum = np.array([0, 1] * 8)
    rows = tuple(
        TensorError(
            f"model.layers.{i}.{role}.{EVIL}",
            role,
            i,
            (64, 256),
            EVIL,
            73728,
            0.1 + 0.01 * i,
            1.0,
            0.99,
            20.0,
            (3, 0, 0.4),
        )
        for i in range(3)
        for role in ("q", "down")
    )
    facts = {
        "sources": [
            {"kind": k, "name": EVIL, "sha256": "ab", "licence": "", "windows": 8, "weight": 1.0}
            for k in ("docs", EVIL)
        ],
        "tokens": 512,
        "sha256": "cd",
    }
    given: dict[str, Any] = {
        "quantized": Side(name, "12", "llama"),
        "reference": Side("original" + EVIL, "34", "llama"),
        "protocol": {"window": 32, "scored": "second half", "seed": 0},
        "corpus": facts,
        "summary": summarize(p, stratum),
        "kinds": {k: summarize(p.kept(stratum[p.window] == i)) for i, k in enumerate(("docs", EVIL))},
        "floor": {
            "kld": 1e-5,
            "median": 5e-6,
            "p99": 1e-4,
            "same_top": 0.999,
            "noise": 2.0**-9,
            "tokens": 40,
        },
        "bytes_": 91_727_136,
        "bytes_reference": 538_090_408,
        "table": TensorTable(rows, 73728 * 6, 64 * 256 * 6, 73728 * 6, 64 * 256 * 6, True),
        "overlap": {"docs": 0.25, EVIL: None},
        "calibration": {"tokens": 1000, "seed": 0, "sha256": EVIL},
        "notes": (Note("tokenizer", EVIL, EVIL),),
        "seconds": 12.0,
        "positions": p,
        "tokens": torch.zeros(16, 40, dtype=torch.long),
        "kind_of_window": kinds,
        "decode": lambda ids: EVIL if len(ids) > 1 else "\n",
    }
    return Record(**{**given, **changes})


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0.03654, 0.00213, "0.0365 ± 0.0021"),
        (12.0638, 0.51, "12.06 ± 0.51"),
        (1834.2, 41.0, "1834 ± 41"),
        (0.0, None, "0"),
        (4.2e-8, None, "4.20e-08"),
        (12.0638, None, "12.06"),
        (1234.5, None, "1234"),
        (None, None, "?"),
        (5.0, math.nan, "5.000"),
        (1e-9, 3e-11, "1.00e-09 ± 3e-11"),
    ],
)
def test_numbers_carry_the_digits_their_error_allows(
    value: float | None, error: float | None, said: str
) -> None:
    assert report.give(value, error) == said


def test_sizes() -> None:
    assert [report.size(n) for n in (12, 1500, 91_727_136, 5e12)] == ["12 B", "1.5 kB", "91.7 MB", "5.0 TB"]


def printed(thing: Any) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(thing)
    return console.export_text()


def test_the_table_says_what_the_record_holds() -> None:
    made = record()
    said = printed(report.table(made.to_json()))
    low, high = made.summary.kld.ci95 or (0, 0)
    assert report.give(made.summary.kld.mean, (high - low) / 2) in said
    assert "91.7 MB" in said and "4.500" in said and "(worst)" in said and "25 %" in said
    assert "[bold red]" in said


def test_json_is_strict() -> None:
    made = record()
    exact = TensorError("a", "q", 0, (4, 4), "f32", 512, 0.0, 0.0, 1.0, math.inf, (0, 0, 0.0))
    plain = record(table=TensorTable((exact,), 512, 16, 512, 16, True)).dumps()
    assert json.loads(plain)["tensors"][0]["sqnr_db"] is None
    assert json.loads(made.dumps())["kld"]["ci95"][0] > 0


def test_a_paired_difference_is_tighter_than_two_intervals() -> None:
    a = record("a", scale=0.05)
    p = a.positions
    better = Positions(**{**vars(p), "kld": p.kld * 0.93})
    found = compare(record("b", positions=better), a)
    assert found.settled and found.better == "b" and found.kld_difference < 0
    low, high = a.summary.kld.ci95 or (0, 0)
    assert found.ci95 is not None and found.ci95[1] - found.ci95[0] < 0.5 * (high - low)
    assert "b is better" in printed(report.comparison(found))
    assert compare(a, a).better is None and compare(a, a).mcnemar_p == 1.0


def test_measurements_of_different_positions_are_not_compared() -> None:
    a = record()
    with pytest.raises(Refused, match="different positions"):
        compare(a, record(corpus={**a.corpus, "sha256": "other"}))
    with pytest.raises(Refused, match="different originals"):
        compare(a, record(reference=Side("x", "other", "llama")))


def test_mcnemar_against_textbook_values() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 7) == pytest.approx(0.0703125)
    assert mcnemar(5, 15) == pytest.approx(0.04139, abs=1e-5)
    assert mcnemar(15, 5) == mcnemar(5, 15)
    assert mcnemar(10, 10) == 1.0
    exact, approximate = mcnemar(450, 550), mcnemar(451, 551)
    assert exact == pytest.approx(approximate, rel=0.02)
