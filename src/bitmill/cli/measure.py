"""``bitmill measure``: what a quantized file lost against its original, and whether that is too much."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import exits, page, say
from bitmill.cli.options import Device, Json, Revision, Text
from bitmill.cli.progress import Teller
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bitmill.measurement.record import Record

WIDE = 120  # columns of a table that goes to a file or a pipe
TYPED = {"max_kld": "kld.mean", "max_kld_p99": "kld.p99", "max_worst_kld": "worst.kld.mean"}

Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        help="Any number of the JSON by its key, the largest that is good (the smallest for same_top and "
        "correlation): --limit kinds.code.kld.mean=0.1; may be repeated.",
        show_default=False,
    ),
]


def measure(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="One or more quantized files or folders.", show_default=False),
    ],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            "-a",
            help="The original: a folder, a .gguf file, a hub id or smollm2.",
            show_default=False,
        ),
    ],
    text: Text = None,
    window: Annotated[int, typer.Option("--window", "--ctx-size", min=4, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of each kind of text.")] = 12,
    every: Annotated[
        bool, typer.Option("--all-positions", help="Score whole windows, not second halves.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text through the chat template.")] = False,
    floor: Annotated[
        bool, typer.Option("--floor/--no-floor", help="Measure the noise floor: the original against itself.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap and of the noise floor.")] = 0,
    device: Device = "cpu",
    revision: Revision = None,
    html: page.Html = None,
    max_kld: Annotated[
        float | None, typer.Option("--max-kld", min=0, help="Largest mean KL divergence.", show_default=False)
    ] = None,
    max_kld_p99: Annotated[
        float | None,
        typer.Option("--max-kld-p99", min=0, help="Largest 99th centile.", show_default=False),
    ] = None,
    max_worst_kld: Annotated[
        float | None,
        typer.Option("--max-worst-kld", min=0, help="Largest mean of the worst kind.", show_default=False),
    ] = None,
    min_same_top: Annotated[
        float | None,
        typer.Option("--min-same-top", min=0, max=1, help="Smallest share, 0 to 1.", show_default=False),
    ] = None,
    limit: Limits = None,
    json: Json = False,
) -> None:
    """Measure what quantization cost: FILE against the original.

    Both models read the same text. The main number is the KL divergence of their next-token distributions,
    in nats a token, with a 95 % interval over whole windows; then how often both prefer the same token,
    perplexity, and the same by kind of text. Several files are measured on the same positions and compared
    in pairs with the first. A threshold that is missed exits with 3; where nothing could be measured the
    code is 4.

        bitmill measure q4.gguf --against smollm2
        bitmill measure gptq.gguf plain.gguf --against ./original --html account.html
        bitmill measure q4.gguf -a ./original --max-kld 0.05 --min-same-top 0.9 --json > account.json
    """
    limits = _limits(
        {"max_kld": max_kld, "max_kld_p99": max_kld_p99, "max_worst_kld": max_worst_kld},
        min_same_top,
        limit or [],
    )
    how = How(text, window, windows, every, chat, floor, seed, device, revision)
    page.refuse(html)
    records = account(files, against, how)
    if html is not None:
        page.measured(records, files, against, how, html)
    if json:
        say.emit(_plain(records))
    else:
        show(records)
    verdict(records, limits)


@dataclass(frozen=True)
class How:
    """How to measure; the defaults are what ``bitmill quantize`` does at its end."""

    text: list[str] | None = None
    window: int = 512
    windows: int = 12
    every: bool = False
    chat: bool = False
    floor: bool = True
    seed: int = 0
    device: str = "cpu"
    revision: str | None = None


def account(files: Sequence[str], against: str, how: How) -> tuple[Record, ...]:
    """Measure ``files`` against ``against``; exits with 4 when nothing could be measured."""
    from bitmill.measurement.measure import NothingMeasured, Protocol, measure_all
    from bitmill.source import open_source

    protocol = Protocol(
        window=how.window,
        count=how.windows,
        scored="all" if how.every else "second half",
        chat=how.chat,
        seed=how.seed,
        floor=how.floor,
    )
    original = open_source(against, revision=how.revision)
    try:
        with Teller() as teller:
            return measure_all(
                list(files), original, texts=how.text, protocol=protocol, device=how.device, progress=teller
            )
    except NothingMeasured as error:
        say.note(f"bitmill: {error}")
        raise typer.Exit(exits.UNMEASURED) from error


def show(records: Sequence[Record]) -> None:
    """The records for a reader; two or more also in pairs with the first."""
    from bitmill.measurement import report
    from bitmill.measurement.compare import compare

    for record in records:
        _print(report.table(record.to_json()))
        say.result()
    for other in records[1:]:
        _print(report.comparison(compare(records[0], other)))


def verdict(records: Sequence[Record], limits: Mapping[str, float]) -> None:
    """Exit with 3 when a record misses a limit, each named on standard error."""
    missed = [f"{record.quantized.name}: {miss}" for record in records for miss in record.missed(limits)]
    for line in missed:
        say.note(f"missed: {line}")
    if missed:
        raise typer.Exit(exits.MISSED)


def _print(shown: RenderableType) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    with console.capture() as held:
        console.print(shown)
    say.result("\n".join(line.rstrip() for line in held.get().splitlines()))


def _plain(records: Sequence[Record]) -> Any:
    from bitmill.measurement.compare import compare

    if len(records) == 1:
        return records[0].to_json()
    pairs = [compare(records[0], other).to_json() for other in records[1:]]
    return {"records": [record.to_json() for record in records], "comparisons": pairs}


def _limits(
    largest: Mapping[str, float | None], same_top: float | None, more: Sequence[str]
) -> dict[str, float]:
    found = {TYPED[name]: value for name, value in largest.items() if value is not None}
    if same_top is not None:
        found["same_top"] = same_top
    for word in more:
        key, equals, value = word.partition("=")
        try:
            found[key.strip()] = float(value)
        except ValueError as error:
            raise Refused(
                f"--limit {word!r} is not KEY=NUMBER" if equals else f"--limit {word!r} has no number",
                fix="for example: --limit kld.mean=0.05",
            ) from error
    return found
