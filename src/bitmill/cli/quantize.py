"""``bitmill quantize``: make the file, then say what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitmill.cli import budget as budgets
from bitmill.cli import measure as measuring
from bitmill.cli import plan as planned
from bitmill.cli import say
from bitmill.cli.options import (
    Bits,
    Calib,
    Chat,
    Device,
    DryRun,
    EmbeddingType,
    Force,
    Group,
    ImatrixFiles,
    ImatrixMissing,
    Json,
    Keep,
    Length,
    Measure,
    Model,
    MomentsFile,
    Out,
    OutputType,
    PreTokenizer,
    Pure,
    Recipe,
    Resume,
    Revision,
    Samples,
    SaveMoments,
    Seed,
    SplitSize,
    SplitTensors,
    Strict,
    TensorType,
    Text,
)  # fmt: skip
from bitmill.cli.progress import Teller
from bitmill.cli.wanted import Types, wanted
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.account import Report

SHOWN_NOTES = 8
LONGEST = 64  # characters of a fact that is worth a place in one line


def quantize(
    model: Model,
    recipe: Recipe = None,
    out: Out = None,
    calib: Calib = None,
    nsamples: Samples = 128,
    seqlen: Length = 512,
    seed: Seed = 0,
    chat: Chat = False,
    device: Device = "cpu",
    keep: Keep = None,
    bits: Bits = None,
    group_size: Group = None,
    tensor_type: TensorType = None,
    output_tensor_type: OutputType = None,
    token_embedding_type: EmbeddingType = None,
    pure: Pure = False,
    split_max_size: SplitSize = None,
    split_max_tensors: SplitTensors = None,
    pre_tokenizer: PreTokenizer = None,
    strict: Strict = False,
    force: Force = False,
    resume: Resume = True,
    moments: MomentsFile = None,
    save_moments: SaveMoments = None,
    imatrix: ImatrixFiles = None,
    imatrix_missing: ImatrixMissing = "plain",
    measure: Measure = True,
    text: Text = None,
    revision: Revision = None,
    bpw: budgets.Bpw = None,
    size: budgets.Size = None,
    fit: budgets.Fit = False,
    damage: budgets.DamageFile = None,
    solver: budgets.SolverName = "gptq",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Quantize MODEL by RECIPE into OUT, and measure what it cost.

    Everything that can be wrong is refused before the first weight is read. A run that is interrupted goes on
    where it was when the same command is given again. OUT appears whole, by one rename, or not at all; beside
    it lies the report of the run, OUT.report.json.

        bitmill quantize smollm2 "gptq : q4_0, embed=q8_0" -o smollm2.gguf
        bitmill quantize ./my-model W4A16 -o my-model-w4a16 --calib chats.jsonl --chat
        bitmill quantize org/name --bits 4 --group-size 64 -o name-int4 --dry-run
        bitmill quantize ./my-model --bpw 4.5 -o my-model.gguf
    """
    from bitmill.planning import plan as make_plan
    from bitmill.source import open_source

    file = (split_max_size, split_max_tensors, pre_tokenizer)
    types = Types(tensor_type or (), output_tensor_type, token_embedding_type, pure, *file)
    limits = budgets.Limits(bpw, size, fit, damage, solver)
    limits.refuse_others(recipe is not None or bits is not None, bool(keep) or types != Types())
    recipe_ = None if limits.given else wanted(recipe, keep or [], bits, group_size, types)
    if out is None and not dry_run:
        raise Refused("no output is named", fix="add -o, for example: -o out.gguf")
    source = open_source(model, revision=revision)
    seen = budgets.Drawn(calib, seqlen=seqlen, seed=seed, chat=chat, device=device)
    recipe_ = recipe_ or budgets.recipe_for(source, limits, seen, out)
    calibrated = bool(calib) or moments is not None or bool(imatrix)
    nsamples, seqlen = (0, 0) if imatrix else (nsamples, seqlen)
    windows: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen}
    made = make_plan(recipe_, source, out, **windows, strict=strict, calibrated=calibrated)
    if dry_run:
        planned.check_imatrix(made, source, imatrix, imatrix_missing)
        say.emit(made.to_json()) if json else planned.show(made, every_row=False)
        return
    assert out is not None
    say.note("\n".join(made.headline))
    from bitmill import mill

    drawn: dict[str, Any] = {"calib": calib or None, **windows, "seed": seed, "chat": chat, "device": device}
    given: dict[str, Any] = {"moments": moments, "imatrix": imatrix or (), "imatrix_missing": imatrix_missing}
    conduct: dict[str, Any] = {"save": save_moments, "force": force, "strict": strict, "resume": resume}
    with Teller() as teller:
        report = mill.quantize(source, recipe_, out, **drawn, **given, **conduct, progress=teller)
    _account(report, model, measuring.How(text=text, device=device, revision=revision), measure, json)


def _account(report: Report, model: str, how: measuring.How, measure: bool, json: bool) -> None:
    if not json:
        _say(report)
    records = measuring.account([report.path], model, how) if measure else ()
    if json:
        say.emit({**report.to_json(), "measurement": records[0].to_json() if records else None})
    elif records:
        say.result()
        measuring.show(records)


def _say(report: Report) -> None:
    calibration: Mapping[str, Any] = report.calibration
    if calibration:
        short = {key: value for key, value in calibration.items() if isinstance(value, int | str)}
        said = ", ".join(f"{key} {value}" for key, value in short.items() if len(str(value)) <= LONGEST)
        say.note(f"calibration: {said}")
    kinds = Counter(note.kind for note in report.notes)
    first = {note.kind: note for note in reversed(report.notes)}
    for kind, count in kinds.most_common(SHOWN_NOTES):
        more = f" (and {count - 1} more of this kind)" if count > 1 else ""
        say.note(f"note: {first[kind].where}: {first[kind].text}{more}")
    say.result(f"{report.path}: {report.bytes_:,} bytes in {say.duration(report.seconds)}")
