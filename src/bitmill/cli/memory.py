"""The memory table of ``bitmill plan``: what running a model takes, and whether a machine has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say

if TYPE_CHECKING:
    from bitmill.advise.cliff import Cliff
    from bitmill.advise.machine import Machine
    from bitmill.advise.memory import Fit, Model, Wanted
    from bitmill.core.axes import Checkpoint
    from bitmill.planning import Plan

USUAL_CONTEXT = 8192
PLACES = {"vram": "VRAM", "ram": "RAM", "unified": "unified memory"}

Context = Annotated[
    int | None,
    typer.Option(
        "--context", "-c", "--ctx-size", "--max-model-len", min=1,
        help="Memory for running it: tokens of each sequence. [default: 8192, or what it was trained for]",
        show_default=False,
    ),
]  # fmt: skip
Parallel = Annotated[
    int | None,
    typer.Option(
        "--parallel", "-np", "--max-num-seqs", min=1, max=256,
        help="Memory for running it: sequences at a time. [default: 1]", show_default=False,
    ),
]  # fmt: skip
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv", "--kv-cache-dtype", metavar="TYPE[,TYPE]",
        help="What keys and values are stored as: f16, q8_0, q4_0, fp8, int4 …; two types are keys, values. "
        "--runtime bitmill has more: turboquant-3.5, kivi-2, q4_0-rot (docs/caches.md).",
        show_default=False,
    ),
]  # fmt: skip
MachineText = Annotated[
    str | None,
    typer.Option(
        "--machine", metavar="WORDS",
        help="What there is: 16GB, vram=24GB, 'rtx4090 + 64GB ddr5', '2x rtx3090', 'm2max 64GB', '8 cores'. "
        "[default: what is free here]",
        show_default=False,
    ),
]  # fmt: skip
RuntimeName = Annotated[
    str | None,
    typer.Option(
        "--runtime", "--for", metavar="NAME[@VERSION]",
        help="What runs it: llama.cpp, transformers, vllm, sglang, mlx or bitmill, or a version (vllm@0.11). "
        "A recipe that it cannot load is refused. [default: the container's usual one]",
        show_default=False,
    ),
]  # fmt: skip
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE.svg",
        help="Draw tokens a second against layers on the card, as modelled.", show_default=False,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The options about memory, as they were given."""

    context: int | None = None
    parallel: int | None = None
    kv: str | None = None
    machine: str | None = None
    runtime: str | None = None
    plot: Path | None = None

    @property
    def anything(self) -> bool:
        """Whether any was."""
        return any(value is not None for value in vars(self).values())


def answer(
    asked: Asked,
    text: str,
    revision: str | None = None,
    made: Plan | None = None,
    source: Checkpoint | None = None,
) -> Answer:
    """What a command line asks about memory; of the plan if there is one, else of the model as it is."""
    from bitmill.advise.cache_types import cache_type, cache_types
    from bitmill.advise.cliff import cliff
    from bitmill.advise.machine import machine
    from bitmill.advise.memory import Wanted, fit
    from bitmill.advise.models import as_it_is, modelled, planned
    from bitmill.source import locate

    there = machine(asked.machine)
    card, program = bool(there.cards), modelled(asked.runtime)
    if made is not None and source is not None:
        model = planned(made, source, program, card)
    else:
        model = as_it_is(locate(text, revision=revision), program, card)
    types = cache_types(asked.kv or model.runtime.types[0])
    context = asked.context or min(USUAL_CONTEXT, model.shape.trained or USUAL_CONTEXT)
    wanted = Wanted(context, asked.parallel or 1, types)
    smaller = [cache_type(name) for name in ("q8_0", "q4_0", "fp8", "int8", "int4")]
    usable = [kind for kind in smaller if kind.name in model.runtime.types and _goes(kind, model)]
    found = Answer(wanted, model, fit(model, wanted, there, usable), there, cliff(model, wanted, there))
    if asked.plot is not None:
        draw(found, asked.plot)
    return found


def _goes(kind: Any, model: Model) -> bool:
    """Whether heads are made of whole blocks of this type."""
    blocks = model.shape.blocks
    return all(kind.refuses(b.head) is None and kind.refuses(b.value_head) is None for b in blocks)


@dataclass(frozen=True)
class Answer:
    """What was asked, of which model, how it fits, and how fast it would be."""

    wanted: Wanted
    model: Model
    fits: tuple[Fit, ...]
    machine: Machine
    cliff: Cliff

    def to_json(self) -> Mapping[str, Any]:
        """As plain values."""
        from bitmill.advise.memory import to_json

        plain = to_json(self.wanted, self.model, self.fits)
        return {**plain, "machine": self.machine.to_json(), "speed": self.cliff.to_json()}

    def show(self) -> None:
        """For a reader: a table a place, then the verdict."""
        wanted, model = self.wanted, self.model
        keys, values = (kind.name for kind in wanted.types)
        kinds = keys if keys == values else f"{keys} and {values}"
        many = f", {wanted.parallel} sequences" if wanted.parallel > 1 else ""
        say.result(f"{model.runtime.name}, context {wanted.context:,}{many}, keys and values as {kinds}")
        if model.shape.trained and wanted.context > model.shape.trained:
            say.result(f"the model was trained for a context of {model.shape.trained:,}")
        say.result()
        places = [PLACES[f.memory.place] for f in self.fits]
        lines = [
            [parts[0].name, *(say.size(p.bytes_) for p in parts), parts[0].evidence]
            for parts in zip(*(f.memory.parts for f in self.fits), strict=True)
        ]
        lines.append(["all", *(say.size(f.memory.bytes_) for f in self.fits), ""])
        lines.append(["there is", *(say.size(f.there_bytes) for f in self.fits), ""])
        say.result(say.table(["", *places, ""], lines, right=range(1, len(places) + 1)))
        say.result()
        for found in self.fits:
            say.result(verdict(found, model.shape.trained))
        say.result()
        for line in speed(self):
            say.result(line)


def verdict(found: Fit, trained: int) -> str:
    """One place's answer in a sentence or two."""
    place = "fits into" if found.fits else "does not fit into"
    by = f"{say.size(abs(found.spare_bytes))} {'to spare' if found.fits else 'too much'}"
    most = f"a context of {found.context:,} fits" if found.context else "no context fits"
    if found.context and found.context >= trained - trained % 256:
        most = f"all of the {trained:,} tokens it was trained for fit"
    others = "; ".join(f"--kv {name}: {context:,}" for name, context in found.others)
    return f"{place} {PLACES[found.memory.place]}: {by}; {most}{f' ({others})' if others else ''}"


def speed(found: Answer) -> list[str]:
    """What the model of the cliff says, in a few lines."""
    from bitmill.advise.cliff import shown

    cliff, context = found.cliff, found.wanted.context
    many = f", each of {found.wanted.parallel}" if found.wanted.parallel > 1 else ""
    full = f"with the {context:,} tokens of context in use (modelled)"
    last, best = cliff.splits[-1], cliff.best
    if best is None:
        return [f"with room for it: {shown(last.decode, ' tokens/s')}{many} {full}"]
    where = ""
    if not found.machine.unified and found.machine.vram_bytes:
        where = f"{'all' if best.whole else f'{best.layers} of'} {best.of} layers on the card: "
        where = f"experts of {best.of - best.layers} layers beside the card: " if best.experts_off else where
    lines = [f"{where}{shown(best.decode, ' tokens/s')}{many} {full}"]
    if best.prefill is not None:
        lines.append(f"first token of so long a prompt after {shown(best.prefill, ' s')} (modelled)")
    if len(cliff.splits) > 1:
        one_off = cliff.splits[-2]
        lines.append(
            f"the cliff: {shown(last.decode)} with all {last.of} layers there, {shown(one_off.decode)} "
            f"with one beside it, {shown(cliff.splits[0].decode)} with none"
        )
    if found.machine.vram_bytes and not found.machine.cards[0].bandwidth:
        lines.append("the card's speed is not known: name it (rtx4090) for better numbers")
    return lines


def draw(found: Answer, path: Path) -> None:
    """Write the plot of tokens a second against layers on the card.

    Raises:
        Refused: there is one split alone, or the file cannot be written.
    """
    from bitmill.core.errors import Refused
    from bitmill.measurement.cliff import cliff_svg

    if len(found.cliff.splits) < 2:
        raise Refused(
            "there is no cliff to draw: the model is in one memory, or its runtime does not part it",
            fix="name a card and main memory: --machine 'rtx4090 + 64GB ddr5'",
        )
    try:
        path.write_text(cliff_svg(found.to_json()), encoding="utf-8")
    except OSError as error:
        raise Refused(f"cannot write {str(path)!r}: {error.strerror}", fix="choose another --plot") from error
