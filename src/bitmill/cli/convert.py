"""``bitmill convert``: a quantized model in another container, exactly where that can be."""

from __future__ import annotations

import time
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import plan as planned
from bitmill.cli import say
from bitmill.cli.options import DryRun, Force, Json, Out, Resume, Revision
from bitmill.cli.progress import Teller
from bitmill.cli.verify import Cards, LoadedBy, refuse_unloadable
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.account import Report

SHOWN = 5  # tensors with the largest error, by name


Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="What is quantized already: a folder (GPTQ, AWQ, compressed-tensors …), a .gguf file, a hub id.",
        show_default=False,
    ),
]
Goal = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="Where it goes (OUT.gguf, or a folder with --to); with -o: a container's name, or a recipe.",
        show_default=False,
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="The container (gptq, compressed-tensors, gguf …), or a recipe that names grids as well.",
        show_default=False,
    ),
]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Put what the container cannot hold exactly on its closest grid.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="f32|f16|bf16",
        help="Precision of what is not quantized. [default: the source's]", show_default=False,
    ),
]  # fmt: skip
Rows = Annotated[bool, typer.Option("--rows", help="A line for every tensor, not for every kind.")]


def convert(
    model: Source,
    goal: Goal,
    out: Out = None,
    to: To = None,
    requantize: Requantize = False,
    dtype: Dtype = None,
    force: Force = False,
    resume: Resume = True,
    revision: Revision = None,
    rows: Rows = False,
    runtime: LoadedBy = None,
    tp: Cards = 1,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write a quantized MODEL in another container, keeping its values where that can hold them.

    A weight keeps its grid or takes one with the very same values: every one is compared before it is written
    and once more as it reads back, bit for bit. What no grid of the container holds is refused. With
    --requantize, or a recipe that names grids, it is rounded from what is stored: the loss of each tensor is
    said, and it comes on top of what the source had lost. Better then to quantize the original model.

        bitmill convert ./model-gptq model.gguf
        bitmill convert ./model-gptq ./model-ct --to compressed-tensors
        bitmill convert model-Q4_0.gguf compressed-tensors -o ./model-ct --for vllm@0.11 --dry-run
        bitmill convert model-Q4_K_M.gguf ./model-gptq --to gptq --requantize
        bitmill convert ./model-awq "nearest : q4_k > gguf" -o model.gguf
    """
    from bitmill import mill, transfer
    from bitmill.conversion import plan_conversion, target
    from bitmill.source import open_source

    started = time.monotonic()
    name, path = _goal(goal, out, to)
    wanted = target(name)
    if dtype is not None and dtype not in planned_dtypes():
        raise Refused(f"--dtype {dtype!r}", fix=f"one of {', '.join(planned_dtypes())}")
    source = open_source(model, revision=revision)
    made = plan_conversion(wanted, source, path, dtype=dtype, requantize=requantize)
    refuse_unloadable([made], runtime, tp)
    if dry_run:
        say.emit(made.to_json()) if json else planned.show(made, rows)
        return
    say.note("\n".join(made.headline))
    mill.refuse_existing(path, made, force)
    loses = transfer.asked_for_loss(wanted, requantize)
    with Teller() as teller:
        report = transfer.carry_over(
            made, source, path, started, loses=loses, force=force, resume=resume, tell=teller
        )
    if json:
        say.emit(report.to_json())
    else:
        _say(report, rows)


def planned_dtypes() -> tuple[str, ...]:
    """Precisions of what is kept."""
    from bitmill.recipe import DTYPES

    return DTYPES


def _goal(goal: str, out: Path | None, to: str | None) -> tuple[str, Path]:
    """The name of what to convert to, and where."""
    if out is not None:
        if to is not None:
            raise Refused(
                f"{goal!r} and --to {to!r} are two answers to one question", fix="leave out one of them"
            )
        return goal, out
    from bitmill.conversion import writable

    known = [name.replace("_", "-") for name in writable()]
    if goal.lower().replace("_", "-") in known or " > " in goal:
        raise Refused(
            "no output is named", fix=f"-o OUT, or the output's path first: convert MODEL OUT --to {goal!r}"
        )
    if to is None and not goal.lower().endswith(".gguf"):
        raise Refused(
            f"in which container {goal!r} is to be is not said", fix=f"--to, with one of: {', '.join(known)}"
        )
    return to or "gguf", Path(goal)


def _say(report: Report, every_row: bool) -> None:
    """What became of each kind of tensor, what was lost, where it lies."""
    kinds: dict[tuple[str, str], list[str]] = {}
    sizes = {row["name"]: prod(row["shape"]) for row in report.plan["rows"]}
    for row in report.plan["rows"]:
        kinds.setdefault((row["grid"], row["why"]), []).append(row["name"])
    total = sum(sizes.values())
    lines = [
        [grid, why, len(found), f"{sum(sizes[n] for n in found) / total:.1%}", _loss(report, found)]
        for (grid, why), found in kinds.items()
    ]
    head = ["grid", "holds", "tensors", "weights", "relative squared error"]
    say.result(say.table(head, lines, right=(2, 3)))
    errors = sorted(report.tensors.items(), key=lambda item: -item[1]["squared"])
    if errors:
        shown = errors if every_row else errors[:SHOWN]
        more = "" if len(shown) == len(errors) else f", the largest {len(shown)} of {len(errors)}"
        say.result(f"\nrelative squared error by tensor{more}:")
        say.result(say.table(["tensor", "error"], [[n, f"{e['squared']:.3g}"] for n, e in shown], right=(1,)))
    for note in report.notes:
        say.result(f"\n{note.text}" if note.kind == "requantized" else f"note: {note.where}: {note.text}")
    if errors:
        say.note(f"what it cost the model: bitmill measure {report.path} --against ORIGINAL")
    say.result(f"{report.path}: {report.bytes_:,} bytes in {say.duration(report.seconds)}")


def _loss(report: Report, names: list[str]) -> str:
    lost = [report.tensors[name] for name in names if name in report.tensors]
    power = sum(e["power"] for e in lost)
    if not lost:
        return "none: the same values"
    overall = sum(e["error"] for e in lost) / max(power, 1e-30)
    return f"{overall:.3g}, worst {max(e['squared'] for e in lost):.3g}"
