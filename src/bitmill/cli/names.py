"""``bitmill names``: what the names of quantized models mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import exits, say
from bitmill.cli.options import Json

if TYPE_CHECKING:
    from bitmill.advise.naming import Explained

BILLION = 8.03  # weights of Llama 3 8B


def names(
    name: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Q4_K_M, IQ3_XXS, UD-Q5_K_XL, W4A16, NVFP4, 4.65bpw …, or a file's name with one in it.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """Explain names of quantizations: what each is, its bits, who runs it, what Bitmill calls it.

    Bits are computed from the layouts themselves: of the linears, and of a whole model of Llama 3 8B's shape.
    A name that Bitmill does not make comes with what is nearest to it. Names that are unknown are listed with
    the known ones they are most like, after all others are explained; then it exits with 2.

        bitmill names Q4_K_M IQ3_XXS UD-Q5_K_XL
        bitmill names W4A16 NVFP4 4.65bpw --json
        bitmill names Llama-3.1-8B-Instruct-Q4_K_L.gguf
    """
    from bitmill.advise.naming import find, nearest

    found = {text: find(text) for text in name}
    unknown = {text: nearest(text) for text, one in found.items() if one is None}
    explained = [one for one in found.values() if one is not None]
    if json:
        missed = [{"name": text, "unknown": True, "nearest": list(close)} for text, close in unknown.items()]
        say.emit([*(one.to_json() for one in explained), *missed])
    else:
        for i, one in enumerate(explained):
            if i:
                say.result()
            show(one)
    for text, close in unknown.items():
        say.note(f"bitmill: {text!r} is no name of a quantization that is known here")
        said = f"did you mean {' or '.join(close)}?" if close else "`bitmill recipes` lists what can be made"
        say.note(f"  try:   {said}")
    if unknown:
        raise typer.Exit(exits.FAILED)


def show(one: Explained) -> None:
    """One name for a reader."""
    say.result(one.name if one.read == one.name else f"{one.name}   ({one.read})")
    lines = [("", one.what)]
    if one.pieces:
        lines.append(("reads", "; ".join(f"{piece} {said}" for piece, said in one.pieces)))
    if one.bits is not None and one.bits.model is None:
        lines.append(("bits", f"{one.bits.type_:g} a weight, by its name"))
    elif one.bits is not None and one.bits.model is not None:
        size = say.size(1e9 * BILLION * one.bits.model / 8)
        lines.append(
            ("bits", f"{one.bits.type_:.2f} in the linears, {one.bits.model:.2f} over Llama 3 8B ({size})")
        )
    lines.append(("runs in", one.runs))
    if one.recipe is not None:
        lines.append(("bitmill", one.recipe + ("   (calibrates on text)" if one.text else "")))
    if one.instead is not None:
        lines.append(("instead", one.instead))
    lines.append(("source", one.source))
    for label, said in lines:
        say.result(f"  {label:<9}{said}" if label else f"  {said}")
