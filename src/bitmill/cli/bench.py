"""``bitmill bench``: tokens a second of a file on this machine, beside what was predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import say
from bitmill.cli.memory import MachineText
from bitmill.cli.options import Json, Revision
from bitmill.cli.progress import Teller
from bitmill.core.errors import BitmillError

if TYPE_CHECKING:
    from pathlib import Path

    from bitmill.advise.speed import Rate, Speed

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="A .gguf file, a model folder, a hub id or smollm2.", show_default=False
    ),
]


def bench(
    file: File,
    prompt: Annotated[
        int, typer.Option("-p", "--n-prompt", min=0, help="Tokens of the prompt; 0 leaves it out.")
    ] = 512,
    generated: Annotated[
        int, typer.Option("-n", "--n-gen", min=0, help="Tokens one by one; 0 leaves them out.")
    ] = 128,
    repeats: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, help="Repeats, after one to warm up.")
    ] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            "-t", "--threads", min=1, help="[default: the cores of this process]", show_default=False
        ),
    ] = None,
    machine: MachineText = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Time FILE as llama-bench does: a prompt at once (pp), and tokens one by one (tg).

    A GGUF file runs in llama.cpp where llama-cpp-python is installed. Anything else runs decoded to float32
    in transformers, which says how fast that is here, and nothing about a runtime with kernels for it.
    Beside each number stands what the model of the machine had predicted (`bitmill plan`).

        bitmill bench model-Q4_K_M.gguf
        bitmill bench model-Q4_K_M.gguf -p 512 -n 128 -r 10 --json
    """
    from bitmill.advise.speed import measured, ratios
    from bitmill.source import locate

    path = locate(file, revision=revision)
    predicted = _predicted(path, machine, prompt, generated)
    how = {"prompt": prompt, "generated": generated, "repeats": repeats}
    with Teller() as teller:
        found = measured(
            path, **how, threads=threads, tell=lambda done, total: teller("bench", done, total, "")
        )
    both = {} if predicted is None else ratios(predicted, found)
    if json:
        say.emit(
            {
                "path": str(path),
                "measured": found.to_json(),
                "modelled": None if predicted is None else predicted.to_json(),
                "predicted_over_measured": both,
            }
        )
        return
    say.result(f"{path.name} in {found.runtime}")
    say.result()
    pairs = (("pp", found.prefill, "prefill"), ("tg", found.decode, "decode"))
    rows = [_row(f"{kind}{r.tokens}", r, predicted, key, both) for kind, r, key in pairs if r is not None]
    say.result(
        say.table(("test", "tokens/s (95 %)", "modelled", "modelled / measured"), rows, right=(1, 2, 3))
    )


def _predicted(path: Path, machine: str | None, prompt: int, generated: int) -> Speed | None:
    """What the model of the machine says; nothing, and why, where it does not know the architecture."""
    from bitmill.advise.machine import machine as described
    from bitmill.advise.speed import modelled

    there = described(machine)
    try:
        return modelled(path, there, prompt, generated)
    except BitmillError as error:
        say.note(f"no prediction: {error.what}")
        return None


def _row(
    test: str, found: Rate, predicted: Speed | None, key: str, both: dict[str, float]
) -> tuple[str, str, str, str]:
    from bitmill.cli.sweep import rate

    expected = None if predicted is None else {"prefill": predicted.prefill, "decode": predicted.decode}[key]
    return (
        test,
        rate(found.to_json()),
        "?" if expected is None else rate(expected.to_json()),
        f"{both[key]:.2f}" if key in both else "?",
    )
