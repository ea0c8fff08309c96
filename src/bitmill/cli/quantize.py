"""``bitmill quantize``: make the file, then say what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitmill.cli import budget as budgets
from bitmill.cli import measure as measuring
from bitmill.cli import page, say
from bitmill.cli import plan as planned
from bitmill.cli.again import quantize_command
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
    OutputType,
    Outs,
    PreTokenizer,
    Pure,
    Recipes,
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
from bitmill.cli.verify import Cards, LoadedBy, refuse_unloadable
from bitmill.cli.wanted import Types, wanted
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.account import Report
    from bitmill.core.axes import Checkpoint
    from bitmill.measurement.record import Record
    from bitmill.planning import Plan
    from bitmill.recipe import Recipe

SHOWN_NOTES = 8
LONGEST = 64  # characters of a fact that is worth a place in one line


def quantize(
    model: Model,
    recipe: Recipes = None,
    out: Outs = None,
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
    html: page.Html = None,
    revision: Revision = None,
    bpw: budgets.Bpw = None,
    size: budgets.Size = None,
    fit: budgets.Fit = False,
    damage: budgets.DamageFile = None,
    solver: budgets.SolverName = "gptq",
    container: budgets.ContainerName = "gguf",
    runtime: LoadedBy = None,
    tp: Cards = 1,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Quantize MODEL by RECIPE into OUT, and measure what it cost.

    All that can be wrong is refused before the first weight is read. An interrupted run goes on when it is
    given again. OUT appears whole or not at all; beside it, OUT.report.json. Several outputs share text.

        bitmill quantize smollm2 "gptq : q4_0, embed=q8_0" -o smollm2.gguf --html page.html
        bitmill quantize ./my-model W4A16 -o my-model-w4a16 --calib chats.jsonl --chat
        bitmill quantize org/name --bits 4 --group-size 64 -o name-int4 --for vllm --dry-run
        bitmill quantize ./my-model --bpw 4.5 --container mlx -o my-model-mlx
        bitmill quantize ./my-model Q4_K_M W4A16 -o my-model.gguf -o my-model-w4a16
    """
    from bitmill.source import open_source

    parts = (split_max_size, split_max_tensors, pre_tokenizer)
    types = Types(tensor_type or (), output_tensor_type, token_embedding_type, pure, *parts)
    limits = budgets.Limits(bpw, size, fit, damage, solver, container=container)
    limits.refuse_others(bool(recipe) or bits is not None, bool(keep) or types != Types())
    asked: Sequence[str | None] = recipe or (None,)
    outs: Sequence[Path | None] = out or (None,) * len(asked)
    recipes = [] if limits.given else [wanted(one, keep or [], bits, group_size, types) for one in asked]
    refuse_unpaired(len(asked), outs, dry_run, save_moments)
    refuse_page(html, measure, dry_run)
    source = open_source(model, revision=revision)
    if limits.given:
        seen = budgets.Drawn(calib, seqlen=seqlen, seed=seed, chat=chat, device=device)
        recipes = [budgets.recipe_for(source, limits, seen, outs[0])]
    drawn: dict[str, Any] = {"calib": calib or None, "seed": seed, "chat": chat, "device": device}
    drawn |= {"nsamples": 0 if imatrix else nsamples, "seqlen": 0 if imatrix else seqlen, "moments": moments}
    drawn |= {"imatrix": imatrix or (), "imatrix_missing": imatrix_missing, "strict": strict}
    plans = _planned(source, recipes, outs, drawn)
    refuse_unloadable(plans, runtime, tp)
    if dry_run:
        _plans(plans, source, imatrix or (), imatrix_missing, json)
        return
    drawn |= {"save": save_moments, "force": force, "resume": resume}
    reports = _made(source, plans, out or (), drawn)
    how = measuring.How(text=text, device=device, revision=revision)
    _page(_account(reports, model, how, measure, json), reports, model, how, drawn, html)


def refuse_unpaired(recipes: int, outs: Sequence[Path | None], dry_run: bool, save: Path | None) -> None:
    """Refuse recipes and outputs whose numbers do not go together, before anything is read."""
    if outs[0] is None and not dry_run:
        raise Refused("no output is named", fix="add -o, for example: -o out.gguf")
    if recipes != len(outs):
        raise Refused(
            f"{recipes} recipes (or budgets) and {len(outs)} outputs",
            fix="a recipe for each -o, in the same order: quantize MODEL RECIPE RECIPE -o OUT -o OUT",
        )
    if len(outs) > 1 and save is not None:
        raise Refused(
            "--save-moments is of one output: each has moments of its own", fix="save them in a run alone"
        )


def refuse_page(html: Path | None, measure: bool, dry_run: bool) -> None:
    """Refuse a page that nothing would be found for, or that has no place."""
    page.refuse(html)
    if html is not None and (dry_run or not measure):
        left_out = "--dry-run makes no file" if dry_run else "--no-measure finds nothing out"
        raise Refused(f"--html shows what was measured, and {left_out}", fix="leave one of them out")


def _planned(
    source: Checkpoint, recipes: Sequence[Recipe], outs: Sequence[Path | None], drawn: Mapping[str, Any]
) -> list[Plan]:
    from bitmill.planning import plan

    told = {name: drawn[name] for name in ("nsamples", "seqlen", "strict")}
    told["calibrated"] = any(drawn[name] for name in ("calib", "moments", "imatrix"))
    return [plan(r, source, to, **told) for r, to in zip(recipes, outs, strict=True)]


def _plans(
    plans: Sequence[Plan], source: Checkpoint, imatrix: Sequence[Path], missing: str, json: bool
) -> None:
    for made in plans:
        planned.check_imatrix(made, source, imatrix, missing)
    if json:
        say.emit(plans[0].to_json() if len(plans) == 1 else [made.to_json() for made in plans])
        return
    for at, made in enumerate(plans):
        if at:
            say.result()
        planned.show(made, every_row=False)


def _made(
    source: Checkpoint, plans: Sequence[Plan], outs: Sequence[Path], how: Mapping[str, Any]
) -> Sequence[Report]:
    from bitmill import mill, several

    say.note("\n".join(line for made in plans for line in made.headline))
    with Teller() as teller:
        if len(outs) == 1:
            return [mill.quantize(source, plans[0].recipe, outs[0], **how, progress=teller)]
        shared = {key: value for key, value in how.items() if key != "save"}
        return several.quantize_many(source, [p.recipe for p in plans], outs, **shared, progress=teller)


def _account(
    reports: Sequence[Report], model: str, how: measuring.How, measure: bool, json: bool
) -> Sequence[Record]:
    for report in () if json else reports:
        _say(report)
    records = measuring.account([report.path for report in reports], model, how) if measure else ()
    if json:
        found = [record.to_json() for record in records] if records else (None,) * len(reports)
        said = [{**r.to_json(), "measurement": m} for r, m in zip(reports, found, strict=True)]
        say.emit(said[0] if len(said) == 1 else said)
    elif records:
        say.result()
        measuring.show(records)
    return records


def _page(
    found: Sequence[Record],
    reports: Sequence[Report],
    model: str,
    how: measuring.How,
    drawn: Mapping[str, Any],
    html: Path | None,
) -> None:
    if html is not None:
        commands = [quantize_command(model, report, drawn, how.revision) for report in reports]
        page.measured(found, [report.path for report in reports], model, how, html, commands)


def _say(report: Report) -> None:
    from bitmill.expert_coverage import said_of

    calibration: Mapping[str, Any] = report.calibration
    if calibration:
        short = {key: value for key, value in calibration.items() if isinstance(value, int | str)}
        said = ", ".join(f"{key} {value}" for key, value in short.items() if len(str(value)) <= LONGEST)
        say.note(f"calibration: {said}")
    if covered := report.to_json().get("experts"):
        say.note(said_of(covered))
    kinds = Counter(note.kind for note in report.notes)
    first = {note.kind: note for note in reversed(report.notes)}
    for kind, count in kinds.most_common(SHOWN_NOTES):
        more = f" (and {count - 1} more of this kind)" if count > 1 else ""
        say.note(f"note: {first[kind].where}: {first[kind].text}{more}")
    say.result(f"{report.path}: {report.bytes_:,} bytes in {say.duration(report.seconds)}")
