"""``bitmill imatrix``: take, merge, convert and read importance matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.options import Calib, Chat, Device, Force, Json, Length, Out, Revision, Samples, Seed
from bitmill.cli.progress import Teller
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.calibrate.importance import Taken
    from bitmill.checkpoint.imatrix import Coverage, Imatrix
    from bitmill.core.axes import Checkpoint
    from bitmill.core.experts import ExpertTokens


Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL|FILE...",
        help="A model to run text through, importance matrices (GGUF or .dat), or both.",
        show_default=False,
    ),
]
Shown = Annotated[
    str | None,
    typer.Option(
        "--experts", metavar="route|all|topk=N|until=N",
        help="Which tokens the experts of a mixture are taken on: those that the router sends them, all, "
        "those for which they are among its first N, or N at least. [default: route]",
        show_default=False,
    ),
]  # fmt: skip
Form = Annotated[
    str | None,
    typer.Option(
        "--format", "--output-format", metavar="gguf|dat",
        help="Of the file that is written. [default: dat if its name ends so, else gguf]",
        show_default=False,
    ),
]  # fmt: skip


def imatrix(
    inputs: Inputs,
    out: Out = None,
    calib: Calib = None,
    nsamples: Samples = 128,
    seqlen: Length = 512,
    seed: Seed = 0,
    chat: Chat = False,
    device: Device = "cpu",
    experts: Shown = None,
    form: Form = None,
    force: Force = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Take, merge, convert or show importance matrices.

    The mean square of every input channel of every weight, which llama.cpp's quantizers weigh errors with. A
    MODEL is run on calibration text; FILEs are read; all of it is merged, and written if there is an OUT. The
    table says how many tokens each weight has seen, and which channels and experts none has reached.

        bitmill imatrix smollm2 -o smollm2.imatrix.gguf
        bitmill imatrix one.gguf two.dat -o both.gguf
        bitmill imatrix both.gguf
        bitmill imatrix ./mixtral --experts until=512 -o mixtral.imatrix.gguf
        bitmill quantize smollm2 Q4_K_M -o q4.gguf --imatrix smollm2.imatrix.gguf
    """
    from bitmill.checkpoint.imatrix import FORMS, is_imatrix, read_imatrix, write_imatrix
    from bitmill.core.experts import ExpertTokens, parse_experts
    from bitmill.expert_coverage import coverage, said_of

    wanted = form or ("dat" if out is not None and out.suffix.lower() == ".dat" else "gguf")
    if wanted not in FORMS:
        raise Refused(f"{wanted!r} is no form of an importance matrix", fix=f"one of: {', '.join(FORMS)}")
    if out is not None and out.exists() and not force:
        raise Refused(f"{str(out)!r} exists", fix="add --force to replace it, or choose another -o")
    models = [text for text in inputs if not is_imatrix(Path(text))]
    policy = None if experts is None else parse_experts(experts)
    parts = [read_imatrix(Path(text)) for text in inputs if text not in models]
    if len(models) > 1:
        raise Refused(f"{len(models)} models are named", where=", ".join(models), fix="give one at a time")
    if models and out is None:
        raise Refused("no output is named", fix="add -o, for example: -o model.imatrix.gguf")
    if policy is not None and not models:
        raise Refused(
            f"experts={policy} chooses tokens while calibrating; these were chosen before",
            fix="leave it out, or name a MODEL",
        )
    covered: dict[str, Any] = {}
    for model in models:
        drawing: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "chat": chat}
        taken = _take(_source(model, revision), calib, drawing, device, policy or ExpertTokens())
        covered = coverage(taken.experts)
        if covered:
            say.note(said_of(covered))
        elif policy is not None:
            say.note(f"note: experts={policy} is for nothing: there are no experts to place")
        parts.insert(0, taken.imatrix)
    whole = parts[0].merged(parts[1:])
    if out is not None:
        write_imatrix(out, whole, wanted)
    show(whole, str(out or ", ".join(inputs)), json, {"experts": covered} if covered else {})


def _take(
    source: Checkpoint,
    calib: list[str] | None,
    drawing: dict[str, Any],
    device: str,
    experts: ExpertTokens,
) -> Taken:
    from bitmill.calibrate.importance import take_imatrix
    from bitmill.calibrate.tokens import calibration_tokens

    with Teller() as tell:
        drawn = calibration_tokens(source, calib, **drawing, progress=tell)
        for remark in drawn.notes:
            say.note(f"note: {remark.where}: {remark.text}")
        return take_imatrix(source, drawn, device, tell, experts)


def show(matrix: Imatrix, name: str, json: bool, more: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Where it comes from, and how well every weight's inputs are known; with ``json`` also ``more``."""
    facts = {
        "path": name,
        "datasets": list(matrix.datasets),
        "chunk_count": matrix.chunk_count,
        "chunk_size": matrix.chunk_size,
        "sha256": matrix.digest,
    }
    known = matrix.coverage()
    if json:
        say.emit({**facts, **more, "entries": [asdict(entry) for entry in known]})
        return
    say.result(f"{name}: {len(known)} weights, {matrix.chunk_count} chunks of {matrix.chunk_size} tokens")
    say.result(f"text: {', '.join(matrix.datasets) or 'not said'}\n")
    head = ["weight", "tokens", "channels", "active", "unseen experts", "sum", "max/mean"]
    say.result(say.table(head, [_line(entry) for entry in known], right=range(1, len(head))))
    silent = [entry.name for entry in known if entry.unseen == entry.matrices]
    idle = sum(entry.unseen for entry in known if entry.matrices > 1)
    say.result(f"\n{len(silent)} weights without data; {idle} experts that no token reached")


def _line(entry: Coverage) -> list[str]:
    least, most = entry.tokens
    return [
        entry.name,
        f"{most:,}" if least == most else f"{least:,}–{most:,}",
        f"{entry.columns:,}",
        f"{entry.active:.1%}",
        f"{entry.unseen} of {entry.matrices}" if entry.matrices > 1 else "–",
        f"{entry.total:.4g}",
        f"{entry.peak:.1f}",
    ]


def _source(model: str, revision: str | None) -> Checkpoint:
    from bitmill.source import open_source

    return open_source(model, revision=revision)
