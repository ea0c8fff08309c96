"""A measurement as one page that works offline and can be mailed: no script, nothing fetched, everything
escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bitmill.measurement import plots
from bitmill.measurement.report import give, half_width, lines, percent, size, worst_tensors

Plain = Mapping[str, Any]
WORST_TENSORS = 12


def page(record: Plain) -> str:
    """The page for one record's plain values (:meth:`~bitmill.measurement.record.Record.to_json`)."""
    name = escape(record["quantized"]["name"])
    body = "".join(
        (
            _head(record),
            _notes(record),
            _section("By kind of text", _KINDS, plots.kinds(record)) + _panel(_kinds_table(record)),
            _section("Where the divergence lies", _CURVE, plots.cumulative(record)),
            _section("By the original’s confidence", _CONFIDENCE, plots.confidence(record)),
            _tensors(record),
            _worst_tokens(record),
            _numbers(record),
            _provenance(record),
        )
    )
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: what quantization cost</title><style>{style}</style></head>"
        f"<body><main>{body}<footer>Measured by Bitmill {escape(record['versions']['bitmill'])}.</footer>"
        "</main></body></html>\n"
    )


_KINDS = (
    "Mean KL divergence from the original, in nats, with 95 % intervals. Lower is better; "
    "plan with the worst kind."
)
_CURVE = "Share of positions whose divergence, in nats, is at most the value below."
_CONFIDENCE = (
    "Mean divergence by the probability of the original’s first choice. What it is sure of should not move."
)


def _head(record: Plain) -> str:
    kld, floor = record["kld"], record["floor"]
    kinds = _listed(list(record["kinds"]))
    against = f"{record['tokens']:,} tokens of {kinds}, against {record['reference']['name']}"
    over = f"{kld['mean'] / floor:,.0f} × the noise floor" if floor else "noise floor not measured"
    ratio = math.exp(record["ln_ppl_ratio"]) - 1
    linears = record["bpw_linears"]
    bits = f"{record['bpw']:.2f} bits a weight" + (f", linears {linears:.2f}" if linears else "")
    cards = (
        ("KL divergence", give(kld["mean"], half_width(kld)), over),
        (
            "Same first choice",
            percent(record["same_top"], record["same_top_se"]),
            f"median KLD {give(kld['median'])}",
        ),
        ("Perplexity", give(record["ppl"]), f"{ratio:+.2%} over {give(record['ppl_reference'])}"),
        ("Size", size(record["bytes"]), bits),
    )
    made = "".join(
        f'<div class="card"><span class="name">{escape(label)}</span><b>{_softened(value)}</b>'
        f"<span>{escape(under)}</span></div>"
        for label, value, under in cards
    )
    title = f"<h1>{escape(record['quantized']['name'])}</h1>"
    return f'{title}<p class="lead">{escape(against)}</p><div class="cards">{made}</div>'


def _softened(value: str) -> str:
    """The uncertainty in smaller, quieter type."""
    number, sign, error = escape(value).partition(" ± ")
    return f"{number} <small>± {error}</small>" if sign else number


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _notes(record: Plain) -> str:
    said = [note["text"] for note in record["notes"]]
    if record["nonfinite"]:
        said.append(
            f"{percent(record['nonfinite'])} of positions had logits that are not numbers; they are left out"
        )
    overlap = {k: v for k, v in (record["overlap"] or {}).items() if v}
    if any(v > 0.01 for v in overlap.values()):
        seen = ", ".join(f"{kind} {percent(share)}" for kind, share in overlap.items())
        said.append(f"phrases of 13 tokens that calibration had seen: {seen}")
    return "".join(f'<p class="note">{escape(text)}</p>' for text in said)


def _section(title: str, said: str, content: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="quiet">{escape(said)}</p>{_panel(content)}'


def _panel(content: str) -> str:
    return f'<div class="panel">{content}</div>'


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of escaped cells; the first ``left`` columns are words, the others numbers."""
    css = [' class="n"' if i >= left else "" for i in range(len(header))]
    head = "".join(f"<th{c}>{escape(h)}</th>" for c, h in zip(css, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{escape(v)}</td>" for c, v in zip(css, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _kinds_table(record: Plain) -> str:
    overlap = record["overlap"] or {}
    rows = [
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
    return _rows(header, rows)


def _tensors(record: Plain) -> str:
    if not record["same_basis"]:
        return ""
    worst = worst_tensors(record, WORST_TENSORS)
    if not worst:
        return ""
    rows = [
        (
            row["name"],
            row["grid"],
            f"{row['bits'] / max(math.prod(row['shape']), 1):.2f}",
            percent(row["relative"]),
            "?" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
            f"{row['place']['row']}, {row['place']['column']}",
            percent(row["place"]["relative"]),
        )
        for row in worst
    ]
    header = ("tensor", "stored as", "bits", "error", "SQNR", "worst row, column", "error there")
    said = "Relative error ‖Ŵ − W‖ / ‖W‖ of every linear weight: the cause, not yet the loss above."
    strip = plots.layers(record)
    shown = _section("Weights, block by block", said, strip) if strip else "<h2>Weights</h2>"
    return shown + _panel(_rows(header, rows, left=2))


def _worst_tokens(record: Plain) -> str:
    rows = []
    for token in record["worst_tokens"]:
        tail = escape(token["context"][-220:])
        said = f'<td class="context mono">{tail}<b>{escape(_visible(token["true"]))}</b></td>'
        choices = "".join(
            f"<td class='mono'>{escape(_visible(token[k]))}</td>" for k in ("reference", "quantized")
        )
        rows.append(
            f'<tr><td class="n">{give(token["kld"])}</td><td>{escape(token["kind"])}</td>{said}{choices}</tr>'
        )
    titles = ("kind", "text and the true token", "original says", "file says")
    header = '<th class="n">nats</th>' + "".join(f"<th>{title}</th>" for title in titles)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>Where it went most wrong</h2>{_panel(table)}"


def _visible(token: str) -> str:
    """White space shown as signs: a table would swallow it."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _numbers(record: Plain) -> str:
    facts = "".join(
        f"<dt>{escape(label.strip())}</dt><dd>{escape(value)}</dd>" for label, value in lines(record)
    )
    return f"<h2>All numbers</h2>{_panel(f'<dl>{facts}</dl>')}"


def _provenance(record: Plain) -> str:
    how = record["protocol"]
    facts: list[tuple[str, str]] = [
        ("file", f"{record['quantized']['name']}  {record['quantized']['digest']}"),
        ("original", f"{record['reference']['name']}  {record['reference']['digest']}"),
        (
            "protocol",
            f"windows of {how['window']}, {how['scored']} scored, KL(original ‖ file), all tokens, float32",
        ),
        ("intervals", f"bootstrap over windows within kinds, 2,000 resamples, seed {how['seed']}"),
        ("tokens", f"{record['corpus']['tokens']:,}, sha256 {record['corpus']['sha256']}"),
    ]
    facts += [
        (
            f"text: {s['kind']}",
            f"{s['name']}, {s['windows']} windows, {s['licence'] or 'licence unknown'}, sha256 {s['sha256']}",
        )
        for s in record["corpus"]["sources"]
    ]
    calibration = record["calibration"] or {}
    known = calibration.get("sha256", "unknown")
    if calibration and calibration.get("tokens"):
        facts.append(
            (
                "calibration",
                f"{calibration['tokens']:,} tokens, seed {calibration.get('seed')}, sha256 {known}",
            )
        )
    facts.append(("versions", ", ".join(f"{name} {v}" for name, v in record["versions"].items())))
    facts.append(("took", f"{record['seconds']:.0f} s"))
    listed = "".join(f'<dt>{escape(k)}</dt><dd class="mono">{escape(str(v))}</dd>' for k, v in facts)
    return f"<h2>Provenance</h2>{_panel(f'<dl>{listed}</dl>')}"
