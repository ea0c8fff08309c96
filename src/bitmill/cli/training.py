"""What the commands which learn share: options, and how they say what they plan and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from bitmill.cli import say
from bitmill.cli.progress import Teller
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.account import Report
    from bitmill.training.lessons import Lessons

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", "--dataset",
        help="Examples: .jsonl with messages, prompt and completion, or text in each row; or .txt.",
        show_default=False,
    ),
]  # fmt: skip
Folder = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", "--output-dir", help="Folder of the adapter that is written.", show_default=False
    ),
]
BaseGrid = Annotated[
    str | None,
    typer.Option(
        "--base-grid",
        help="What the base is frozen on: any grid of `bitmill recipes`. [default: nf4-b64-dq; a model that "
        "is quantized already keeps its codes]",
        show_default=False,
    ),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        "--held-out",
        help="Examples that judge and do not teach. [default: one in ten of --data, at most 64]",
        show_default=False,
    ),
]
Steps = Annotated[
    int, typer.Option("--steps", "--max-steps", min=0, help="Of the optimizer; 0 is one pass over the data.")
]
Rank = Annotated[int, typer.Option("--rank", "--lora-r", min=1, help="Of the adapter.")]
Alpha = Annotated[float, typer.Option("--alpha", "--lora-alpha", help="The adapter counts alpha / rank.")]
Rate = Annotated[float, typer.Option("--lr", "--learning-rate", help="Learning rate, behind the warm-up.")]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Examples of a step.")]
Context = Annotated[
    int, typer.Option("--context", "--max-seq-length", min=8, help="Most tokens of an example.")
]
MicroTokens = Annotated[
    int,
    typer.Option("--micro-tokens", min=8, help="Tokens in the model at once: less memory, the same steps."),
]
Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer", metavar="auto|adamw|adamw8bit|paged-adamw8bit|paged-adamw32bit",
        help="States in 32 or 8 bits, the latter by bitsandbytes; auto takes 8 bits on a GPU.",
    ),
]  # fmt: skip
Kept = Annotated[str, typer.Option("--keep", metavar="best|last", help="The step that is written.")]
Drawn = Annotated[int, typer.Option("--seed", min=0, help="Of the start and of the order of the examples.")]
Starting = Annotated[
    bool, typer.Option("--scratch", help="Start from random weights; MODEL gives tokenizer and shape.")
]
Shape = Annotated[
    str,
    typer.Option(
        "--shape", metavar="layers=4,hidden=256,…",
        help="With --scratch, another shape: layers, hidden, mlp, heads, kv-heads, head-dim.",
        show_default=False,
    ),
]  # fmt: skip
Written = Annotated[
    str, typer.Option("--recipe", help="What is written: a layout of ternary weights, by plain rounding.")
]


class Planned(Protocol):
    """What would be learned."""

    @property
    def headline(self) -> tuple[str, ...]:
        """What matters first."""

    @property
    def lessons(self) -> Lessons:
        """What from."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""


def named(data: Path | None, out: Path | None, dry_run: bool, ways: tuple[str, str], example: str) -> Path:
    """The data, once it and an output are named.

    Args:
        ways: what there is none of (``text is``, ``examples are``), and how it is given.

    Raises:
        Refused: they are not.
    """
    if data is None:
        raise Refused(f"no {ways[0]} named", fix=ways[1])
    if out is None and not dry_run:
        raise Refused("no output is named", fix=f"add -o, for example: -o {example}")
    return data


def carried_out(
    made: Planned,
    out: Path | None,
    dry_run: bool,
    json: bool,
    learn: Callable[[Path, Teller], Report],
    account: Callable[[Report], None],
) -> None:
    """Say the plan; learn, unless nothing is to be written, and say what came of it."""
    if dry_run or out is None:
        if json:
            say.emit({**made.to_json(), "data": dict(made.lessons.facts)})
        else:
            say.result("\n".join(made.headline))
        return
    say.note("\n".join(made.headline))
    with Teller() as teller:
        report = learn(out, teller)
    say.emit(report.to_json()) if json else account(report)


def traced(report: Report, unit: str) -> Mapping[str, Any]:
    """The table of judgements, and notes; the facts of the run.

    Args:
        unit: of the losses, and what else there is to say of them.
    """
    facts = report.tuning
    rows = [[step, "" if not step else f"{loss:.4f}", f"{held:.4f}"] for step, loss, held in facts["trace"]]
    say.result(say.table(["step", "loss", "held out"], rows, right=(0, 1, 2)))
    say.result(unit)
    for note in report.notes:
        say.note(f"note: {note.text}")
    return facts


def ending(report: Report) -> str:
    """What was written, and how long it took."""
    return f"{report.path}: {report.bytes_:,} bytes in {say.duration(report.seconds)}"
