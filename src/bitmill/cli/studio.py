"""``bitmill studio``: a model's tensors on any grid, in a browser of this machine."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.again import reported_command
from bitmill.cli.options import Json, Revision
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.core.axes import Checkpoint
    from bitmill.studio.server import Answers

Opened = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a .gguf file, a hub id or smollm2; of a file that Bitmill made, its report is "
        "shown, too. [default: smollm2, where it is installed]",
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against", "-a", metavar="MODEL",
        help="What MODEL was made from: weights before and after, tensor by tensor.", show_default=False,
    ),
]  # fmt: skip
Port = Annotated[
    int,
    typer.Option("--port", min=0, max=65535, help="Of the server on 127.0.0.1; 0 is any that is free."),
]


def studio(
    model: Opened = None,
    against: Against = None,
    port: Port = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open a browser where there is a desktop.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be opened; read headers alone, serve nothing.")
    ] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Look at a model's tensors on any grid, live in a browser: bits, groups, outliers, numbers bit by bit.

    A page on this machine alone, at an address with a random token. Rows of a tensor are read when they are
    looked at, and rounded by the code that quantizes; nothing is written. Of a file that Bitmill made it
    shows the report, and with --against each tensor before and after. Ctrl-C ends it.

        bitmill studio smollm2
        bitmill studio q4.gguf --against ./original
        bitmill studio ./my-model --port 8642 --no-browser
    """
    from bitmill.source import open_source

    file = _usual() if model is None else model
    if file is None and against is not None:
        raise Refused("--against is of a model, and none is named", fix="bitmill studio FILE --against MODEL")
    opened = None if file is None else open_source(file, revision=revision)
    original = None if against is None else open_source(against)
    if dry_run:
        _would(opened, original, json)
        return
    from bitmill.studio.opened import opened as answers

    told = answers(opened, original, _again(opened, against or "MODEL"))
    _serve(told, _plain(opened, original), port, browser and not json and _desktop(), json)


def _serve(answers: Answers, about: dict[str, Any], port: int, browser: bool, json: bool) -> None:
    from bitmill.studio.server import Server

    with Server(answers, port) as server:
        if json:
            say.emit({**about, "url": server.url, "port": server.server_port})
            sys.stdout.flush()
        else:
            say.result(server.url)
            sys.stdout.flush()
            say.note("Open it in a browser of this machine; who has the address can look. Ctrl-C ends it.")
        if browser:
            webbrowser.open(server.door)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say.note()


def _would(opened: Checkpoint | None, original: Checkpoint | None, json: bool) -> None:
    if json:
        say.emit(_plain(opened, original))
        return
    plain = _plain(opened, original)
    if opened is None:
        say.result("would show numbers bit by bit; no model is open")
        return
    report = "with the report of the run that made it" if plain["report"] else "no report lies beside it"
    say.result(f"would open {plain['model']}: {plain['about']}; {report}")
    if original is not None:
        say.result(f"and compare its tensors with those of {plain['original']}")
    say.result("rows are read when they are looked at; nothing is written")


def _plain(opened: Checkpoint | None, original: Checkpoint | None) -> dict[str, Any]:
    from bitmill.pages.beside import report_of
    from bitmill.studio.opened import lead

    return {
        "model": None if opened is None else str(opened.path),
        "about": None if opened is None else lead(opened, original),
        "original": None if original is None else str(original.path),
        "report": opened is not None and bool(report_of(opened.path)),
    }


def _again(opened: Checkpoint | None, original: str) -> list[str]:
    """Commands that make and measure a file of ours again."""
    from bitmill.pages.beside import report_of

    made = None if opened is None else reported_command(report_of(opened.path), original, opened.path)
    if opened is None or made is None:
        return []
    return [made, shlex.join(["bitmill", "measure", opened.path.name, "--against", original])]


def _usual() -> str | None:
    """The model that comes as a package, where it is installed."""
    from bitmill.source import EMBEDDED, embedded_model

    try:
        embedded_model()
    except Refused:
        return None
    return EMBEDDED


def _desktop() -> bool:
    """Whether somebody sits before this machine who could see a browser."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))
