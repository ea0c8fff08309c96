"""The command ``bitmill``: one verb a file, errors as sentences, exit codes as a contract."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

import typer

from bitmill.cli import exits, say
from bitmill.cli.advise import advise
from bitmill.cli.bench import bench
from bitmill.cli.budget import budget
from bitmill.cli.convert import convert
from bitmill.cli.doctor import doctor
from bitmill.cli.finetune import finetune
from bitmill.cli.imatrix import imatrix
from bitmill.cli.inspect import inspect as inspect_file
from bitmill.cli.measure import measure
from bitmill.cli.merge import merge
from bitmill.cli.names import names
from bitmill.cli.plan import plan
from bitmill.cli.plots import plots
from bitmill.cli.publish import publish
from bitmill.cli.quantize import quantize
from bitmill.cli.recipes import recipes
from bitmill.cli.run import run
from bitmill.cli.studio import studio
from bitmill.cli.summarize import summarize
from bitmill.cli.sweep import sweep
from bitmill.cli.train_ternary import train_ternary
from bitmill.cli.verify import verify
from bitmill.core.errors import BitmillError

ABOUT = """Quantize any language model with any method into the file your runtime already loads, and measure
what it cost.

    bitmill quantize MODEL RECIPE -o OUT      make it, then say what it cost
    bitmill measure FILE --against MODEL      say what any quantized file cost
    bitmill convert FILE OUT                  the same values in another container
    bitmill run FILE "prompt"                 let any of them answer
    bitmill verify FILE --for RUNTIME         say whether a file is sound, safe, and loads there

MODEL is a Hugging Face folder, a .gguf file, a hub id (org/name) or smollm2, the small model that comes as a
package. RECIPE is a name people already use (Q4_K_M, W4A16, nf4 …) or one line:
awq + gptq : int4-g128 > compressed-tensors.
"""


def _help(text: str) -> str:
    """A docstring for the terminal: indented paragraphs (examples) keep their lines."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if p.startswith("    ") else p for p in paragraphs)


app = typer.Typer(
    name="bitmill",
    help=_help(ABOUT),
    epilog=exits.LEGEND,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def _add(verb: Callable[..., None], *, alone: bool = False) -> None:
    """Register a verb; ``alone`` says that it works without arguments."""
    text = verb.__doc__ or ""
    app.command(
        verb.__name__.replace("_", "-"),
        help=_help(text),
        short_help=text.strip().splitlines()[0],
        epilog=exits.LEGEND,
        no_args_is_help=not alone,
    )(verb)


_add(quantize)
_add(measure)
_add(convert)
_add(run)
_add(summarize)
_add(plan)
_add(inspect_file)
_add(verify)
_add(budget)
_add(sweep)
_add(bench)
_add(publish)
_add(plots)
_add(advise)
_add(imatrix)
_add(finetune)
_add(merge)
_add(train_ternary)
_add(studio, alone=True)
_add(names)
_add(recipes, alone=True)
_add(doctor, alone=True)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say.result(f"bitmill {version('bitmill')}")
        raise typer.Exit(exits.GOOD)


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", "-V", callback=_version, is_eager=True, help="Print the version."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show the traceback of an error; works after a verb too."
    ),
) -> None:
    """Options of every verb; ``--debug`` is taken off the command line by :func:`main`."""


class _Boundary:
    """Around a whole command: what goes wrong becomes one message and one exit code, never a traceback."""

    def __init__(self, debug: bool) -> None:
        self._debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit):
            if isinstance(error, SystemExit) and error.code == exits.STOPPED:
                say.note("\nstopped")
            return
        if self._debug:
            traceback.print_exception(kind, error, trace)
        if isinstance(error, BrokenPipeError):
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # Python flushes once more on its way out
            sys.exit(exits.GOOD)
        if isinstance(error, KeyboardInterrupt):
            sys.exit(exits.STOPPED)
        if isinstance(error, BitmillError):
            say.note(f"bitmill: {error}")
            asked = isinstance(error.__cause__, KeyboardInterrupt)  # a full disk is a failure
            sys.exit(exits.STOPPED if asked else exits.FAILED)
        say.note(f"bitmill: {type(error).__name__}: {error}")
        say.note("  This is a defect of bitmill. Run the command again with --debug for the traceback.")
        sys.exit(exits.FAILED)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    with _Boundary(debug):
        app([word for word in words if word != "--debug"], prog_name="bitmill")


if __name__ == "__main__":
    main()
