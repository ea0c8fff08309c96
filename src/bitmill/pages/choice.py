"""The page of several files of one model: a sweep's tiers, or files that were measured together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from bitmill.measurement.report import give, half_width, percent, size
from bitmill.pages import plots
from bitmill.pages.experts import experts
from bitmill.pages.frontier import frontier
from bitmill.pages.heat import heat
from bitmill.pages.parts import Card, commands, facts, listed, panel, rows, section, strip
from bitmill.pages.record import cards, map_of, memory_of, worst_tokens
from bitmill.pages.shell import page as whole

Plain = Mapping[str, Any]
_MOST_MAPS = 16  # files whose cells a page carries


@dataclass(frozen=True)
class Choice:
    """Several files of one model, the smallest first.

    Attributes:
        title: of the page.
        tiers: plain values: ``name recipe calibrated_on bytes bpw kld same_top standing speed seconds``.
        records: their measurements, in the same order.
        weighted: errors of outputs by tensor, in the same order.
        memory: stacks of :func:`~bitmill.pages.memory.stack`, in the same order; empty where unknown.
        picked: the tier that is looked at closely.
        panels: its tensors.
        budget: bytes, or None.
        remarks: what to take from the table, in sentences.
        differences: pairs of names with a sentence about their difference.
        commands: that make it again.
        report: of the run that made the picked tier: for what its experts had seen.
    """

    title: str
    tiers: Sequence[Plain]
    records: Sequence[Plain]
    weighted: Sequence[Mapping[str, float]]
    picked: str
    memory: Sequence[Plain] = ()
    panels: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    remarks: Sequence[str] = ()
    differences: Sequence[tuple[str, str, str]] = ()
    commands: Sequence[str] = ()
    report: Mapping[str, Any] = field(default_factory=dict)


def page(choice: Choice) -> str:
    """The page."""
    names = [str(t["name"]) for t in choice.tiers]
    at = names.index(choice.picked)
    closest = choice.records[at]
    order = [at, *(i for i in range(len(names)) if i != at)][:_MOST_MAPS]
    comparable = all(choice.records[i]["same_basis"] for i in order)
    maps = [choice.records[i] for i in order], [choice.weighted[i] for i in order]
    picture, cells = heat(*maps) if comparable else ("", {})
    shown = [names[i] for i in order]
    body = "".join(
        (
            _head(choice, closest),
            section("Size against loss", _FRONT, frontier(choice.tiers, closest["floor"], choice.budget)),
            panel(_table(choice)),
            _remarks(choice.remarks),
            _differences(choice),
            section("Where the divergence lies", _CURVES, plots.cumulative(choice.records, names)),
            map_of(shown, picture, bool(choice.panels)),
            memory_of(names if choice.memory else []),
            _closely(choice.picked, closest),
            experts(choice.report),
            _times(choice),
            commands(choice.commands) if choice.commands else "",
            _provenance(choice, closest),
        )
    )
    data = {"heat": cells, "files": shown, "memory": list(choice.memory), "picked": choice.picked}
    return whole(choice.title, body, data, choice.panels)


_FRONT = (
    "Mean KL divergence from the original, in nats, with 95 % intervals. Nothing is both smaller and better "
    "than a file on the line; the large point is its knee, beyond which more bytes buy less."
)
_CURVES = "Share of positions whose divergence, in nats, is at most the value below."


def _head(choice: Choice, closest: Plain) -> str:
    kinds = listed(list(closest["kinds"]))
    against = f"{closest['tokens']:,} tokens of {kinds}, against {closest['reference']['name']}"
    tier = next(t for t in choice.tiers if t["name"] == choice.picked)
    first = Card(*_why(choice, tier))
    return (
        f"<h1>{escape(choice.title)}</h1>"
        f'<p class="lead">{escape(against)}</p>{strip([first, *cards(closest, tier["speed"])])}'
    )


def _remarks(said: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(text)}</li>" for text in said)
    return f'<ul class="remarks">{lines}</ul>' if lines else ""


def _why(choice: Choice, tier: Plain) -> tuple[str, str, str]:
    """Label, value and reason of the file that is looked at closely."""
    if choice.budget:
        return "Best within budget", choice.picked, f"least loss in {size(choice.budget)}"
    if tier["standing"]["knee"]:
        return "Knee", choice.picked, "beyond it more bytes buy less"
    return (
        "Looked at closely",
        choice.picked,
        "" if len(choice.tiers) == 1 else f"of {len(choice.tiers)} files",
    )


def _table(choice: Choice) -> str:
    header = ("file", "", "size", "bits", "KL divergence", "p99", "same choice", "worst kind", "tokens/s")
    lines, marks = [], []
    for tier, record in zip(choice.tiers, choice.records, strict=True):
        standing, kld = tier["standing"], tier["kld"]
        lines.append(
            (
                tier["name"],
                standing_of(standing),
                size(tier["bytes"]),
                f"{tier['bpw']:.2f}",
                give(kld["mean"], half_width(kld)),
                give(kld["p99"]),
                percent(tier["same_top"], tier["same_top_se"]),
                f"{give(record['worst']['kld']['mean'])} {record['worst_kind']}",
                _speed(tier["speed"]),
            )
        )
        marks.append("knee" if standing["knee"] else "" if standing["front"] else "beaten")
    return rows(header, lines, left=2, marked=marks)


def standing_of(found: Plain) -> str:
    """Where a tier stands, in a few words."""
    if found["front"]:
        return "front, knee" if found["knee"] else "front"
    return f"beaten by {found['beaten_by']}{'' if found['settled'] else ' ~'}"


def _speed(found: Plain | None) -> str:
    decode = (found or {}).get("decode")
    if decode is None:
        return "?"
    if decode["repeats"] or decode["ci95"] is None:
        half = None if decode["ci95"] is None else (decode["ci95"][1] - decode["ci95"][0]) / 2
        return give(decode["mean"], half)
    return " to ".join(f"{end:.3g}" for end in decode["ci95"])


def _differences(choice: Choice) -> str:
    if not choice.differences:
        return ""
    said = "The same positions, a paired bootstrap over windows: far tighter than two intervals side by side."
    header = ("smaller", "larger", "mean KLD of the smaller less that of the larger")
    return section("Neighbours", said, rows(header, choice.differences, left=3))


def _closely(name: str, record: Plain) -> str:
    kinds = section(
        f"{name} by kind of text", "Mean KL divergence, in nats, with 95 % intervals.", plots.kinds(record)
    )
    return kinds + worst_tokens(record)


def _times(choice: Choice) -> str:
    table = []
    for tier in choice.tiers:
        found = tier.get("seconds")
        if found is None:
            return ""
        parts = [("bar", 0.0, found["making"]), ("bar pooled", found["making"], found["measuring"])]
        table.append((str(tier["name"]), parts))
    return section("Time", "Making, then (paler) measuring, each file.", plots.timeline(table))


def _provenance(choice: Choice, record: Plain) -> str:
    how = record["protocol"]
    told = [
        ("original", f"{record['reference']['name']}  {record['reference']['digest']}"),
        ("protocol", f"windows of {how['window']}, {how['scored']} scored, KL(original ‖ file), float32"),
        ("intervals", f"bootstrap over windows within kinds, 2,000 resamples, seed {how['seed']}"),
        ("tokens", f"{record['corpus']['tokens']:,}, sha256 {record['corpus']['sha256']}"),
        *((str(t["name"]), f"{t['recipe']}; calibrated on {t['calibrated_on']}") for t in choice.tiers),
        ("versions", ", ".join(f"{name} {v}" for name, v in record["versions"].items())),
    ]
    return f"<h2>Provenance</h2>{panel(facts(told, 'mono'))}"
