"""The memory table of ``bitmill plan``: what running a model takes, and whether a machine has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say

if TYPE_CHECKING:
    from bitmill.advise.memory import Fit, Model, Wanted
    from bitmill.core.axes import Checkpoint
    from bitmill.planning import Plan

USUAL_CONTEXT = 8192

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
        help="What keys and values are stored as: f16, q8_0, q4_0, fp8, int4 …; two types are keys, values.",
        show_default=False,
    ),
]  # fmt: skip
MachineText = Annotated[
    str | None,
    typer.Option(
        "--machine", metavar="SIZES",
        help="The memory there is: 16GB, vram=24GB or ram=64GB,vram=24GB. [default: what is free here]",
        show_default=False,
    ),
]  # fmt: skip
RuntimeName = Annotated[
    str | None,
    typer.Option(
        "--runtime", metavar="NAME",
        help="What runs it: llama.cpp, transformers, vllm or mlx. [default: the container's usual one]",
        show_default=False,
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
    from bitmill.advise.machine import machine
    from bitmill.advise.memory import Wanted, fit
    from bitmill.advise.models import as_it_is, planned
    from bitmill.source import locate

    there = machine(asked.machine)
    card = bool(there.vram_bytes)
    if made is not None and source is not None:
        model = planned(made, source, asked.runtime, card)
    else:
        model = as_it_is(locate(text, revision=revision), asked.runtime, card)
    types = cache_types(asked.kv or model.runtime.types[0])
    context = asked.context or min(USUAL_CONTEXT, model.shape.trained or USUAL_CONTEXT)
    wanted = Wanted(context, asked.parallel or 1, types)
    smaller = [cache_type(name) for name in ("q8_0", "q4_0", "fp8", "int8", "int4")]
    usable = [kind for kind in smaller if kind.name in model.runtime.types and _goes(kind, model)]
    return Answer(wanted, model, fit(model, wanted, there, usable))


def _goes(kind: Any, model: Model) -> bool:
    """Whether heads are made of whole blocks of this type."""
    return all(not b.head % kind.block and not b.value_head % kind.block for b in model.shape.blocks)


@dataclass(frozen=True)
class Answer:
    """What was asked, of which model, and how it fits."""

    wanted: Wanted
    model: Model
    fits: tuple[Fit, ...]

    def to_json(self) -> Mapping[str, Any]:
        """As plain values."""
        from bitmill.advise.memory import to_json

        return to_json(self.wanted, self.model, self.fits)

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
        places = [f.memory.place.upper() for f in self.fits]
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


def verdict(found: Fit, trained: int) -> str:
    """One place's answer in a sentence or two."""
    place = "fits into" if found.fits else "does not fit into"
    by = f"{say.size(abs(found.spare_bytes))} {'to spare' if found.fits else 'too much'}"
    most = f"a context of {found.context:,} fits" if found.context else "no context fits"
    if found.context and found.context >= trained - trained % 256:
        most = f"all of the {trained:,} tokens it was trained for fit"
    others = "; ".join(f"--kv {name}: {context:,}" for name, context in found.others)
    return f"{place} {found.memory.place.upper()}: {by}; {most}{f' ({others})' if others else ''}"
