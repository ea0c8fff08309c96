"""``bitmill merge``: an adapter into weights, and what rounding them again costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import measure as measuring
from bitmill.cli import plan as planned
from bitmill.cli import say
from bitmill.cli.options import (
    Calib,
    Chat,
    Device,
    DryRun,
    Force,
    Json,
    Length,
    Measure,
    Model,
    Out,
    Recipe,
    Resume,
    Revision,
    Samples,
    Seed,
    Strict,
    Text,
)
from bitmill.cli.progress import Teller
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.adapters.merge import Merged
    from bitmill.measurement.record import Record


def merge(
    model: Model,
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="Folder of a LoRA adapter, as peft writes it.", show_default=False
        ),
    ],
    recipe: Recipe = None,
    out: Out = None,
    base_grid: Annotated[
        str | None,
        typer.Option(
            "--base-grid", help="Add to the linears as rounded to this grid, as they were when it learned.",
            show_default=False,
        ),
    ] = None,
    calib: Calib = None,
    nsamples: Samples = 128,
    seqlen: Length = 512,
    seed: Seed = 0,
    chat: Chat = False,
    device: Device = "cpu",
    strict: Strict = False,
    force: Force = False,
    resume: Resume = True,
    measure: Measure = True,
    text: Text = None,
    revision: Revision = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Write MODEL with ADAPTER in its weights: in 16 bits, or quantized by RECIPE.

    The adapter is added in float32 to the dense weights, and rounding happens once. With a recipe the result
    is measured against the merged weights before they were rounded: that divergence is what quantizing the
    merge costs, which is seldom what quantizing the model cost.

        bitmill merge ./my-model my-adapter -o merged
        bitmill merge ./my-model my-adapter Q4_K_M -o merged.gguf
        bitmill merge ./my-model my-adapter "gptq : int4-g128-sym > compressed-tensors" -o merged-w4a16
    """
    from bitmill.adapters.adapter import read_adapter
    from bitmill.adapters.merge import Merged, sixteen_bits
    from bitmill.planning import plan as make_plan
    from bitmill.recipe import parse
    from bitmill.source import open_source

    if out is None and not dry_run:
        raise Refused("no output is named", fix="add -o, for example: -o merged")
    source = open_source(model, revision=revision)
    made = Merged(source, read_adapter(adapter), base_grid)
    wanted = parse(recipe or sixteen_bits(source))
    windows: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen}
    planned_as = make_plan(wanted, made, out, **windows, strict=strict, calibrated=bool(calib))
    if dry_run or out is None:
        say.emit(planned_as.to_json()) if json else planned.show(planned_as, every_row=False)
        return
    from bitmill import mill

    say.note("\n".join(planned_as.headline))
    drawn = {"calib": calib or None, **windows, "seed": seed, "chat": chat, "device": device}
    with Teller() as teller:
        report = mill.quantize(
            made, wanted, out, **drawn, strict=strict, force=force, resume=resume, progress=teller
        )
    record = _priced(made, out, text, device) if measure and recipe is not None else None
    if json:
        say.emit({**report.to_json(), "measurement": None if record is None else record.to_json()})
        return
    for note in report.notes[:8]:
        say.note(f"note: {note.where}: {note.text}")
    say.result(f"{report.path}: {report.bytes_:,} bytes in {say.duration(report.seconds)}")
    if record is not None:
        say.result("\nagainst the merge before it was rounded:\n")
        measuring.show([record])


def _priced(merged: Merged, out: Path, text: list[str] | None, device: str) -> Record:
    """The divergence of what was written from the merged weights as they were."""
    from bitmill.cli import exits
    from bitmill.measurement.measure import NothingMeasured, measure_all

    try:
        with Teller() as teller:
            return measure_all([str(out)], merged, texts=text, device=device, progress=teller)[0]
    except NothingMeasured as error:
        say.note(f"bitmill: {error}")
        raise typer.Exit(exits.UNMEASURED) from error
