"""``bitmill budget``: the type of each tensor by measured damage, under a limit in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import say
from bitmill.cli.options import Calib, Chat, Device, Force, Json, Length, Model, Out, Revision, Seed
from bitmill.cli.progress import Teller
from bitmill.core.errors import BadRecipe, Refused

if TYPE_CHECKING:
    from bitmill.budgeting import Budgeted
    from bitmill.calibrate.damage import Damage
    from bitmill.core.axes import Checkpoint
    from bitmill.recipe import Recipe

Bpw = Annotated[
    float | None,
    typer.Option(
        "--bpw", help="Budget: bits a weight of the whole file, headers and all.", show_default=False
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="SIZE", help="Budget: bytes of the file, 80MiB or 4.2GB.", show_default=False
    ),
]
Fit = Annotated[
    bool,
    typer.Option(
        "--fit", help="Budget: the memory that is free, less a fifth or at least a GiB for the context."
    ),
]
DamageFile = Annotated[
    Path | None,
    typer.Option(
        "--damage", metavar="FILE",
        help="With a budget: what each type costs each tensor. Read if the file is there, measured and "
        "written if not. [default: OUT.damage.json]", show_default=False,
    ),
]  # fmt: skip
SolverName = Annotated[
    str,
    typer.Option("--solver", help="With a budget: the solver, with options if need be: 'gptq(damp=0.05)'."),
]
TypeNames = Annotated[
    str | None,
    typer.Option(
        "--types", metavar="TYPE,TYPE",
        help="With a budget: the types to choose from. [default: all that were measured]", show_default=False,
    ),
]  # fmt: skip


ContainerName = Annotated[
    str,
    typer.Option(
        "--container", metavar="NAME",
        help="With a budget: what it is stored in: gguf, mlx, compressed-tensors, gptq, auto-round or "
        "bitmill. Types are chosen among those that it has.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a command line says about a budget.

    Attributes:
        bpw, size, fit: the limit, one of them.
        damage: where the measurement is, or goes; None is beside the output.
        solver: that will place the weights.
        types: that may be used, with commas.
        container: what the output is stored in.
    """

    bpw: float | None = None
    size: str | None = None
    fit: bool = False
    damage: Path | None = None
    solver: str = "gptq"
    types: str | None = None
    container: str = "gguf"

    @property
    def given(self) -> bool:
        """Whether there is a budget at all."""
        return self.bpw is not None or self.size is not None or self.fit

    def refuse_others(self, recipe: bool, changes: bool) -> None:
        """A budget answers what a recipe, and changes to one, would answer too.

        Raises:
            BadRecipe: there is a budget, and one of them; or what belongs to a budget without one.
        """
        if not self.given and (self.damage, self.solver, self.container) != (None, "gptq", "gguf"):
            raise BadRecipe(
                "--damage, --solver and --container belong to a budget",
                fix="add --bpw, --size or --fit; a recipe names its solver: 'clip : Q4_K_M'",
            )
        if self.given and recipe:
            raise BadRecipe(
                "a recipe and a budget are two answers to one question",
                fix="leave the recipe out; --solver names the solver",
            )
        if self.given and changes:
            raise BadRecipe(
                "a budget chooses the type of every tensor of one file",
                fix="bitmill budget MODEL … -o recipe.toml, then quantize by that file with these options",
            )


@dataclass(frozen=True)
class Drawn:
    """The text that damage is measured on, as for calibration."""

    calib: Sequence[str] | None = None
    nsamples: int = 16
    seqlen: int = 512
    seed: int = 0
    chat: bool = False
    device: str = "cpu"


def budget(
    model: Model,
    out: Out = None,
    bpw: Bpw = None,
    size: Size = None,
    fit: Fit = False,
    damage: DamageFile = None,
    solver: SolverName = "gptq",
    types: TypeNames = None,
    container: ContainerName = "gguf",
    calib: Calib = None,
    nsamples: Annotated[int, typer.Option("--nsamples", min=1, help="Windows to measure on.")] = 16,
    seqlen: Length = 512,
    seed: Seed = 0,
    chat: Chat = False,
    device: Device = "cpu",
    force: Force = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose a type for every tensor of MODEL, so that a budget loses as little as possible.

    What each type would cost each tensor, in KL divergence, is measured once on calibration text, with one
    backward pass through the whole model in float32, and kept in OUT.damage.json. The least predicted sum
    within the budget is written to OUT as a recipe. The file it makes is never larger than the budget, and a
    larger budget never has a worse prediction. What is predicted is rounding with importance; gptq loses
    less, and nearest needs --calib or --imatrix to lose no more. What a container or its programs want alike
    has one type: all experts of a stack in GGUF, queries, keys and values in compressed-tensors. An expert's
    damage is by how often it is used.

        bitmill budget smollm2 --bpw 5 -o recipe.toml
        bitmill budget smollm2 --size 80MiB -o small.toml --damage recipe.toml.damage.json
        bitmill quantize smollm2 recipe.toml -o smollm2.gguf
        bitmill quantize ./my-model --bpw 4.5 -o my-model.gguf
        bitmill quantize ./my-model --bpw 4.5 --container mlx -o my-model-mlx
    """
    from bitmill.budgeting import toml
    from bitmill.source import open_source

    if out is None:
        raise Refused("no output is named", fix="add -o, for example: -o recipe.toml")
    if out.suffix.lower() != ".toml":
        raise Refused(f"{str(out)!r} does not end in .toml", fix=f"-o {out.with_suffix('.toml')}")
    if out.exists() and not force:
        raise Refused(f"{str(out)!r} exists", fix="add --force to replace it, or choose another -o")
    limits = Limits(bpw, size, fit, damage, solver, types, container)
    source = open_source(model, revision=revision)
    made, measured = chosen(source, limits, Drawn(calib, nsamples, seqlen, seed, chat, device), out)
    out.write_text(toml(made, measured), encoding="utf-8")
    if json:
        say.emit(
            {
                "path": str(out),
                "recipe": str(made.recipe),
                "limit": made.limit,
                "bytes": made.plan.bytes_,
                "bpw": made.plan.bpw,
                "predicted_kld": made.budget.damage,
                "types": dict(made.types),
                "damage": dict(measured.facts),
            }
        )
        return
    say.result(f"{out}: {made.plan.bytes_:,} of {made.limit:,} bytes, {made.plan.bpw:.3f} bits a weight")
    say.result(said(made))


def recipe_for(source: Checkpoint, limits: Limits, drawn: Drawn, out: Path | None) -> Recipe:
    """As :func:`chosen`, with a line about the choice."""
    made, _ = chosen(source, limits, drawn, out)
    say.note(said(made))
    return made.recipe


def said(made: Budgeted) -> str:
    """The choice in one line."""
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in made.shares.items())
    return f"predicted KL divergence {made.budget.damage:.3g} nats; {shares}"


def chosen(source: Checkpoint, limits: Limits, drawn: Drawn, out: Path | None) -> tuple[Budgeted, Damage]:
    """The recipe within the limits, and the measurement behind it, which is taken if it is not there.

    Raises:
        Refused: no limit or several; too few bytes; another model's measurement.
    """
    from math import prod

    from bitmill.budgeting import budgeted, limit_of
    from bitmill.core.registry import parse_grid
    from bitmill.lots import menu, refuse_container
    from bitmill.recipe import parse
    from bitmill.run.memory import available_bytes

    free = available_bytes() if limits.fit else None
    parameters = sum(prod(fact.shape) for fact in source.tensors.values())
    limit = limit_of(limits.bpw, limits.size, free, parameters)
    types = [str(parse_grid(kind)) for kind in (limits.types or "").split(",") if kind.strip()]
    container = limits.container.lower().replace("-", "_")
    refuse_container(container)
    parse(f"{limits.solver} : Q8_0 > gguf")  # a wrong solver is said before anything is measured
    if free is not None:
        say.note(f"{say.size(free)} of memory are free: the file gets {say.size(limit)}")
    damage = _measured(source, limits.damage, drawn, out, menu(container, types))
    made = budgeted(source, damage, limit, solver=limits.solver, types=types, container=container)
    return made, damage


def _measured(
    source: Checkpoint, path: Path | None, drawn: Drawn, out: Path | None, kinds: Sequence[str]
) -> Damage:
    from bitmill.calibrate.damage import Damage, measure_damage
    from bitmill.calibrate.tokens import calibration_tokens

    if path is None and out is not None:
        path = out.with_name(out.name + ".damage.json")
    if path is not None and path.exists():
        say.note(f"damage: {path}, measured before")
        return Damage.load(path, source)
    with Teller() as tell:
        tokens = calibration_tokens(
            source,
            drawn.calib or None,
            nsamples=drawn.nsamples,
            seqlen=drawn.seqlen,
            seed=drawn.seed,
            chat=drawn.chat,
            progress=tell,
        )
        for remark in tokens.notes:
            say.note(f"note: {remark.where}: {remark.text}")
        damage = measure_damage(source, tokens, drawn.device, tell, drawn.seed, kinds)
    if path is not None:
        damage.save(path)
        say.note(f"damage: kept in {path}")
    return damage
