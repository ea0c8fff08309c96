"""``bitmill verify``: whether a model file is sound, safe to load, and loadable by a runtime."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import exits, say
from bitmill.cli.options import Json, Revision
from bitmill.cli.progress import Teller

if TYPE_CHECKING:
    from bitmill.planning import Plan
    from bitmill.trust.findings import Finding
    from bitmill.trust.verdict import Verdict

WIDEST = 110
LABEL = 9

For = Annotated[
    list[str] | None,
    typer.Option(
        "--for", metavar="RUNTIME[@VERSION]",
        help="Who shall load it: vllm, sglang, transformers, llama.cpp or mlx, in a version (vllm@0.11, "
        "llama.cpp@2025-06) or the newest known. May be repeated.",
        show_default=False,
    ),
]  # fmt: skip
LoadedBy = Annotated[
    str | None,
    typer.Option(
        "--for", metavar="RUNTIME[@VERSION]",
        help="Who shall load it (vllm, vllm@0.11, llama.cpp, mlx …): what it cannot load is refused here.",
        show_default=False,
    ),
]  # fmt: skip
Cards = Annotated[
    int,
    typer.Option("--tp", "--tensor-parallel-size", min=1, help="Cards that each layer is parted among."),
]


def verify(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A model folder, a .gguf file, a hub id, or smollm2.", show_default=False
        ),
    ],
    runtime: For = None,
    tp: Cards = 1,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="Compare tokenizer and chat template with this model's."
        ),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Read every number: NaN, infinities, matrices of zeros.")
    ] = False,
    write_manifest: Annotated[
        bool,
        typer.Option(
            "--write-manifest", help="If nothing is wrong, write checksums: SHA256SUMS, or FILE.sha256."
        ),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Check a model file before trusting it: sound, safe, and loadable by a runtime; no GPU is needed.

    Always: headers against the file's real size, settings against tensors, names and shapes against the
    architecture, pickles, code that loaders may run, the chat template, and checksums where SHA256SUMS (or
    FILE.sha256) lies there. With --for also what that runtime demands in that version, each fact with its
    source and date. An error exits with 3; what has to be installed, or was not seen to work, is a warning.

        bitmill verify model.gguf --for llama.cpp
        bitmill verify ./my-model-w4a16 --for vllm@0.11 --for sglang --tp 4
        bitmill verify ./download --base org/original --values --json
    """
    from bitmill.trust.sums import write_manifest as write
    from bitmill.trust.verdict import verify as look

    with Teller() as teller:
        found = look(
            file, to=tuple(runtime or ()), tp=tp, base=base, values=values, revision=revision, tell=teller
        )
        wrong = [f for f in found.found if f.level == "error" and f.check != "manifest"]
        made = write(found.where, teller) if write_manifest and not wrong else None
    if json:
        say.emit({**found.to_json(), "manifest": None if made is None else str(made)})
    else:
        show(found)
        if made is not None:
            say.result(f"wrote {made}")
        elif write_manifest:
            say.note("no checksums were written: the file is not sound")
    errors = len(wrong) if made is not None else found.count("error")
    if errors or (strict and found.count("warning")):
        raise typer.Exit(exits.MISSED)


def refuse_unloadable(plans: Sequence[Plan], runtime: str | None, tp: int = 1) -> None:
    """Refuse plans that the runtime cannot load, before anything is made; say what it needs beside itself."""
    if runtime is None:
        return
    from bitmill.trust.contracts import target
    from bitmill.trust.planned import refuse_unloadable as judged

    to = target(runtime)
    for made in plans:
        for finding in judged(made.files, to, tp):
            fix = f"; {finding.fix}" if finding.fix else ""
            say.note(f"{finding.level}: {finding.what}{fix}")


def show(found: Verdict) -> None:
    """What was found, for a reader: what it is, what was checked, each finding, and the sum."""
    method = {"gguf": "GGUF", "dense": "dense", None: "not readable"}.get(found.method, found.method)
    many = f", {found.tensors:,} tensors, {say.size(found.bytes_)}" if found.tensors else ""
    say.result(f"{found.path}: {method}{many}")
    say.result(_wrapped(f"checked: {', '.join(found.checked)}", 0))
    for to in found.to:
        parted = f" on {found.tp} cards" if found.tp > 1 else ""
        say.result(f"{to}{parted}: facts as of {to.contract.date}")
    for finding in found.found:
        say.result()
        _say(finding)
    say.result()
    counted = [
        f"{found.count(level) or 'no'} {level}{'s' * (found.count(level) != 1)}"
        for level in ("error", "warning", "note")
    ]
    say.result(", ".join(counted))


def _say(finding: Finding) -> None:
    """One finding: its level, the sentence, and under it where, what to do, and whose word it is."""
    say.result(_wrapped(f"{finding.level:<{LABEL}}{finding.what}", LABEL))
    about = (("where:", finding.where), ("try:", finding.fix), ("source:", finding.source))
    for label, text in about:
        if text:
            say.result(_wrapped(f"{'':<{LABEL}}{label:<8}{text}", LABEL + 8))


def _wrapped(text: str, indent: int) -> str:
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    return textwrap.fill(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
