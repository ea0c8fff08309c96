"""The page of one file against its original: what it lost, where, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from bitmill.measurement.report import give, half_width, lines, percent, size, worst_tensors
from bitmill.pages import plots
from bitmill.pages.experts import experts
from bitmill.pages.heat import heat
from bitmill.pages.parts import Card, commands, facts, listed, note, panel, rows, section, strip
from bitmill.pages.shell import page as whole

Plain = Mapping[str, Any]
WORST_TENSORS = 12
LIKE_Q4, LIKE_Q2 = 0.0313, 0.4451
"""Mean KLD of Q4_K_M and of Q2_K on Llama 3 8B, as llama.cpp's README has them: what people take as good, and
as the end of what is usable."""
SAME_Q4, SAME_Q2 = 0.919, 0.7114
"""Their shares of positions with the same first choice, from there."""
_SOURCE = "limits: Q4_K_M and Q2_K of Llama 3 8B in llama.cpp's own table"
_SEEN = 0.01


@dataclass(frozen=True)
class Extras:
    """What a page shows beside the measurement; all of it may be missing.

    Attributes:
        weighted: error of each weight's output, from the run's report.
        panels: of tensors, see :func:`~bitmill.pages.anatomy.anatomies`.
        memory: see :func:`~bitmill.pages.memory.stack`.
        speed: plain values of a :class:`~bitmill.advise.speed.Speed`.
        commands: that make and measure this again.
        times: what took how long: label, class, start, seconds.
        report: of the run that made the file: for what its experts had seen.
    """

    weighted: Mapping[str, float] = field(default_factory=dict)
    panels: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    commands: Sequence[str] = ()
    times: Sequence[tuple[str, str, float, float]] = ()
    report: Mapping[str, Any] = field(default_factory=dict)


def page(record: Plain, extras: Extras | None = None) -> str:
    """The page for one record's plain values (:meth:`~bitmill.measurement.record.Record.to_json`)."""
    more = extras or Extras()
    name = str(record["quantized"]["name"])
    picture, cells = heat([record], [more.weighted]) if record["same_basis"] else ("", {})
    body = "".join(
        (
            _head(record, more),
            notes(record),
            section("By kind of text", _KINDS, plots.kinds(record)) + panel(_kinds_table(record)),
            section("Where the divergence lies", _CURVE, plots.cumulative([record])),
            section("By the original’s confidence", _CONFIDENCE, plots.confidence(record)),
            map_of([name], picture, bool(more.panels)),
            _tensors(record),
            experts(more.report),
            worst_tokens(record),
            memory_of([name] if more.memory else []),
            _times(more),
            commands(more.commands) if more.commands else "",
            _numbers(record),
            _provenance(record),
        )
    )
    data = {"heat": cells, "files": [name], "memory": [more.memory] if more.memory else []}
    return whole(f"{name}: what quantization cost", body, data, more.panels)


def map_of(names: Sequence[str], picture: str, clickable: bool) -> str:
    """The heat map with its choices, and the place where a tensor's panel opens."""
    if not picture:
        return ""
    files = _select("file", "file", names) if len(names) > 1 else ""
    modes = ("error of the weight", "error of its output", "bits a weight", "type")
    said = "Blocks across, roles down; darker is more. "
    said += "A click, or the arrow keys and Enter, opens a tensor." if clickable else ""
    return (
        f'<h2>Weights, block by block</h2><p class="quiet">{escape(said)}</p><div class="panel" id="map">'
        f'<div class="choices">{_select("mode", "show", modes)}{files}</div>'
        f'<div class="scroll">{picture}</div><div id="key" class="key"></div>'
        '<div id="tensor" aria-live="polite"></div></div>'
    )


def memory_of(names: Sequence[str]) -> str:
    """The slider and the place of the bar; the script draws it."""
    if not names:
        return ""
    files = _select("memory-file", "file", names) if len(names) > 1 else ""
    return (
        '<h2>Memory of running it</h2><p class="quiet">One sequence, all of its context in use.</p>'
        f'<div class="panel" id="memory"><div class="choices">{files}<label>keys and values '
        '<select id="memory-type"></select></label><label class="slide">context <input type="range" '
        'id="context" min="0" step="1"><output id="context-said"></output></label></div>'
        '<div id="stack"></div></div>'
    )


def _select(id_: str, label: str, names: Sequence[str]) -> str:
    options = "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(names))
    return f'<label>{escape(label)} <select id="{id_}">{options}</select></label>'


def _times(more: Extras) -> str:
    if not more.times:
        return ""
    table = [(label, [(css, start, took)]) for label, css, start, took in more.times]
    return section("Time", "Seconds on the machine that made it.", plots.timeline(table))


_KINDS = (
    "Mean KL divergence from the original, in nats, with 95 % intervals. Lower is better; "
    "plan with the worst kind."
)
_CURVE = "Share of positions whose divergence, in nats, is at most the value below."
_CONFIDENCE = (
    "Mean divergence by the probability of the original’s first choice. What it is sure of should not move."
)


def _head(record: Plain, more: Extras) -> str:
    kinds = listed(list(record["kinds"]))
    against = f"{record['tokens']:,} tokens of {kinds}, against {record['reference']['name']}"
    return (
        f"<h1>{escape(record['quantized']['name'])}</h1>"
        f'<p class="lead">{escape(against)}</p>{strip(cards(record, more.speed))}'
    )


def cards(record: Plain, speed: Plain | None = None) -> list[Card]:
    """The verdict in numbers, each with what it is to be compared with."""
    kld, floor, linears = record["kld"], record["floor"], record["bpw_linears"]
    over = f"{kld['mean'] / floor:,.0f} × the noise floor" if floor else "noise floor not measured"
    ratio = math.exp(min(record["ln_ppl_ratio"], 700.0)) - 1
    bits = f"{record['bpw']:.2f} bits a weight" + (f", linears {linears:.2f}" if linears else "")
    same = percent(record["same_top"], record["same_top_se"])
    found = [
        Card("KL divergence", give(kld["mean"], half_width(kld)), over, _loss_state(kld["mean"]), _SOURCE),
        Card("Same first choice", same, f"median KLD {give(kld['median'])}", _same_state(record), _SOURCE),
        Card("Perplexity", give(record["ppl"]), f"{ratio:+.2%} over {give(record['ppl_reference'])}"),
        Card("Size", size(record["bytes"]), bits),
    ]
    decode = (speed or {}).get("decode")
    if speed is not None and decode is not None:
        found.append(
            Card("Tokens a second", f"{decode['mean']:.3g}", f"{speed['runtime']}, {speed['evidence']}")
        )
    if record["nonfinite"]:
        found.append(Card("Not a number", percent(record["nonfinite"]), "of positions", "bad"))
    return found


def _loss_state(kld: float) -> str:
    return "good" if kld <= LIKE_Q4 else "fair" if kld <= LIKE_Q2 else "bad"


def _same_state(record: Plain) -> str:
    share = record["same_top"]
    return "good" if share >= SAME_Q4 else "fair" if share >= SAME_Q2 else "bad"


def notes(record: Plain) -> str:
    """What a reader should not miss."""
    said = [remark["text"] for remark in record["notes"]]
    if record["nonfinite"]:
        said.append(
            f"{percent(record['nonfinite'])} of positions had logits that are not numbers; they are left out"
        )
    overlap = {k: v for k, v in (record["overlap"] or {}).items() if v}
    if any(v > _SEEN for v in overlap.values()):
        seen = ", ".join(f"{kind} {percent(share)}" for kind, share in overlap.items())
        said.append(f"phrases of 13 tokens that calibration had seen: {seen}")
    return "".join(map(note, said))


def _kinds_table(record: Plain) -> str:
    overlap = record["overlap"] or {}
    table = [
        (
            kind,
            give(found["kld"]["median"]),
            give(found["kld"]["p99"]),
            percent(found["same_top"], found["same_top_se"]),
            give(found["ppl"], found["ppl_se"]),
            give(found["ppl_reference"]),
            f"{found['right_to_wrong']} / {found['wrong_to_right']}",
            "unknown" if overlap.get(kind) is None else percent(overlap[kind]),
        )
        for kind, found in sorted(record["kinds"].items(), key=lambda item: -item[1]["kld"]["mean"])
    ]
    header = ("kind", "median", "p99", "same choice", "perplexity", "original", "lost / won", "seen before")
    return rows(header, table)


def _tensors(record: Plain) -> str:
    if not record["same_basis"]:
        return ""
    table = [
        (
            row["name"],
            row["grid"],
            f"{row['bits'] / max(math.prod(row['shape']), 1):.2f}",
            percent(row["relative"]),
            "?" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
            f"{row['place']['row']}, {row['place']['column']}",
            percent(row["place"]["relative"]),
        )
        for row in worst_tensors(record, WORST_TENSORS)
    ]
    header = ("tensor", "stored as", "bits", "error", "SQNR", "worst row, column", "error there")
    said = "Relative error ‖Ŵ − W‖ / ‖W‖ of a weight: the cause, not yet the loss above."
    return section("The worst weights", said, rows(header, table, left=2)) if table else ""


def worst_tokens(record: Plain) -> str:
    """The positions with the largest divergence, in their text, with what both models would rather say."""
    made = []
    for token in record["worst_tokens"]:
        tail = escape(token["context"][-220:])
        said = f'<td class="context mono">{tail}<b>{escape(_visible(token["true"]))}</b></td>'
        choices = "".join(f"<td>{_choices(token, side)}</td>" for side in ("reference", "quantized"))
        made.append(
            f'<tr><td class="n">{give(token["kld"])}</td><td>{escape(token["kind"])}</td>{said}{choices}</tr>'
        )
    titles = ("kind", "text and the true token", "original says", "file says")
    header = '<th class="n">nats</th>' + "".join(f"<th>{title}</th>" for title in titles)
    table = f'<table class="tokens"><thead><tr>{header}</tr></thead><tbody>{"".join(made)}</tbody></table>'
    return f"<h2>Where it went most wrong</h2>{panel(table)}"


def _choices(token: Plain, side: str) -> str:
    """The five most probable tokens, or the first alone where no more was kept."""
    first = token.get(f"top_{side}") or []
    if not first:
        return f'<span class="mono">{escape(_visible(token[side]))}</span>'
    lines = (
        f"<li{' class=' + chr(34) + 'true' + chr(34) if said == token['true'] else ''}>"
        f'<span class="mono">{escape(_visible(said))}</span> <small>{share:.0%}</small></li>'
        for said, share in first
    )
    return f'<ol class="top">{"".join(lines)}</ol>'


def _visible(token: str) -> str:
    """White space shown as signs: a table would swallow it."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _numbers(record: Plain) -> str:
    pairs = [(label.strip(), value) for label, value in lines(record)]
    return f"<h2>All numbers</h2>{panel(facts(pairs))}"


def _provenance(record: Plain) -> str:
    how = record["protocol"]
    told: list[tuple[str, str]] = [
        ("file", f"{record['quantized']['name']}  {record['quantized']['digest']}"),
        ("original", f"{record['reference']['name']}  {record['reference']['digest']}"),
        (
            "protocol",
            f"windows of {how['window']}, {how['scored']} scored, KL(original ‖ file), all tokens, float32",
        ),
        ("intervals", f"bootstrap over windows within kinds, 2,000 resamples, seed {how['seed']}"),
        ("tokens", f"{record['corpus']['tokens']:,}, sha256 {record['corpus']['sha256']}"),
    ]
    told += [
        (
            f"text: {s['kind']}",
            f"{s['name']}, {s['windows']} windows, {s['licence'] or 'licence unknown'}, sha256 {s['sha256']}",
        )
        for s in record["corpus"]["sources"]
    ]
    calibration = record["calibration"] or {}
    known = calibration.get("sha256", "unknown")
    if calibration and calibration.get("tokens"):
        told.append(
            (
                "calibration",
                f"{calibration['tokens']:,} tokens, seed {calibration.get('seed')}, sha256 {known}",
            )
        )
    told.append(("versions", ", ".join(f"{name} {v}" for name, v in record["versions"].items())))
    told.append(("took", f"{record['seconds']:.0f} s"))
    return f"<h2>Provenance</h2>{panel(facts(told, 'mono'))}"
