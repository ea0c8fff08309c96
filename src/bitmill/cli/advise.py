"""``bitmill advise``: what to make of which model, for a machine, a context and a job."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import say
from bitmill.cli.memory import PLACES, Context, Kv, MachineText, Parallel
from bitmill.cli.options import Json, Measure, Revision

if TYPE_CHECKING:
    from bitmill.advise.advice import Advice
    from bitmill.advise.options import Option

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="A folder, a config.json, a .gguf file, a hub id or smollm2; several are weighed together. "
        "Only the configuration is read.",
        show_default=False,
    ),
]
JobName = Annotated[
    str,
    typer.Option("--job", help="chat, code, extract, serve, finetune or edge."),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        "--runtime", metavar="NAME",
        help="What is to run it: llama.cpp, vllm, mlx, transformers or bitmill. "
        "[default: by job and machine]",
        show_default=False,
    ),
]  # fmt: skip
Measured = Annotated[
    list[str] | None,
    typer.Option(
        "--measured", metavar="RECIPE=FILE",
        help="A record of `bitmill measure --json` of this model by that recipe; it overrules the rules. "
        "May be repeated.",
        show_default=False,
    ),
]  # fmt: skip
Make = Annotated[bool, typer.Option("--make", help="Make it: run the command that is advised.")]
Target = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="With --make: where the result goes.", show_default=False),
]


def advise(
    models: Models,
    machine: MachineText = None,
    context: Context = None,
    parallel: Parallel = None,
    job: JobName = "chat",
    runtime: Runtime = None,
    kv: Kv = None,
    measured: Measured = None,
    make: Make = False,
    out: Target = None,
    measure: Measure = True,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose model, recipe and cache for a machine, a context and a job; with evidence, and what came second.

    Nothing is downloaded but configurations. Each number says whose it is: measured here, measured elsewhere
    on this family, or modelled. Of several MODELs (the same in several sizes) the largest wins that fits with
    headroom, is quick enough and has bits enough. That nothing fits is an answer, with the context at which
    something would. Without --machine: this one.

        bitmill advise org/model-14B org/model-8B --machine "rtx4060ti + 64GB ddr5" --context 32768
        bitmill advise ./model/config.json --machine "a100" --job serve --parallel 32
        bitmill advise ./my-model --job code --make -o my-model.gguf
    """
    from bitmill.advise.advice import advise as choose
    from bitmill.advise.inventory import bare_model
    from bitmill.advise.machine import machine as describe
    from bitmill.advise.options import Asked
    from bitmill.advise.quality import read_measured
    from bitmill.advise.rules import job as named
    from bitmill.advise.rules import runtime_for
    from bitmill.advise.runtimes import runtime_named
    from bitmill.core.errors import Refused

    if make and (json or out is None):
        wrong = "--make has a report of its own: --json is one answer" if json else "--make needs an output"
        raise Refused(wrong, fix="run the line that stands under `make`" if json else "-o OUT")
    there, wanted = describe(machine), named(job)
    program = runtime_named(runtime or runtime_for(wanted, there)[0])
    asked = Asked(
        machine=there,
        job=wanted,
        runtime=program,
        context=context or wanted.context,
        parallel=parallel or wanted.parallel,
        measured=read_measured(measured or []),
        kv=kv,
    )
    found = choose([(text, bare_model(text, revision)) for text in models], asked)
    if json:
        plain = {**found.to_json(), "make": command(found, out), "run": running(found, out)}
        say.emit(plain)
    else:
        show(found, out, runtime is None)
    if make and out is not None:
        _make(found, out, measure, revision)


def _make(found: Advice, out: Path, measure: bool, revision: str | None) -> None:
    """Run the line that is advised."""
    from bitmill.cli.quantize import quantize
    from bitmill.core.errors import Refused

    if found.chosen is None:
        raise Refused("nothing fits, so nothing is made", fix="a smaller model, or a shorter --context")
    if command(found, out) is None:
        say.note("the model is to stay as it is: nothing is made")
        return
    source = _source(found.chosen.model)
    if source == "MODEL":
        raise Refused("a configuration has no weights", where=found.chosen.model, fix="name its folder")
    quantize(source, [found.chosen.recipe], [out], measure=measure, revision=revision)


def command(found: Advice, out: Path | None = None) -> str | None:
    """The line that makes what is advised; None when nothing is, or the model is to stay as it is."""
    if found.chosen is None or found.chosen.recipe.startswith("hf-"):
        return None
    words = ["bitmill", "quantize", _source(found.chosen.model), found.chosen.recipe]
    return shlex.join([*words, "-o", str(_target(found, out))])


def running(found: Advice, out: Path | None = None) -> str | None:
    """The line that runs it, with the context, the cache and the layers that were reckoned with."""
    option, asked = found.chosen, found.asked
    if option is None or asked.job.name == "finetune":
        return None
    target = str(_target(found, out)) if not option.recipe.startswith("hf-") else option.model
    name = asked.runtime.name
    if name == "vllm":
        words = ["vllm", "serve", target, "--max-model-len", f"{asked.context}"]
        words += ["--max-num-seqs", f"{asked.parallel}"]
        words += ["--kv-cache-dtype", option.kv] if option.kv not in ("bf16", "f16") else []
        return shlex.join(words)
    if name == "mlx":
        words = ["mlx_lm.server", "--model", target]
        return shlex.join(words + (["--kv-bits", option.kv[3:]] if option.kv.startswith("int") else []))
    if name != "llama.cpp":
        return None
    whole = asked.context * asked.parallel
    words = ["llama-server", "-m", target, "-c", f"{whole}", "-np", f"{asked.parallel}"]
    words += ["-ctk", option.kv, "-ctv", option.kv] if option.kv != "f16" else []
    split = option.split
    if asked.machine.cards and split is not None:
        beside = split.of - split.layers
        layers = 999 if split.whole or split.experts_off else split.layers + 1
        words += ["-ngl", f"{layers}"]
        words += ["--n-cpu-moe", f"{beside}"] if split.experts_off and beside else []
    return shlex.join(words)


def _short(text: str) -> str:
    """A model's name without the folders it lies in."""
    path = Path(text)
    return path.parent.name or path.name if path.name == "config.json" else path.name.removesuffix(".json")


def _source(text: str) -> str:
    """What a verb that reads weights takes for a model that was named by its configuration."""
    path = Path(text)
    if path.suffix != ".json":
        return text
    return (
        str(path.parent) if path.name == "config.json" and any(path.parent.glob("*.safetensors")) else "MODEL"
    )


def _target(found: Advice, out: Path | None) -> Path:
    """Where the result goes: as it was said, or the model's name with the recipe's."""
    if out is not None or found.chosen is None:
        return out or Path("out")
    name = _short(found.chosen.model).removesuffix(".gguf")
    return Path(f"{name}-{found.chosen.recipe}{'.gguf' if found.asked.runtime.name == 'llama.cpp' else ''}")


def show(found: Advice, out: Path | None, chose_runtime: bool) -> None:
    """For a reader: the answer, its numbers and whose they are, why, and what came second."""
    from bitmill.advise.rules import runtime_for

    asked, best = found.asked, found.chosen
    many = f", {asked.parallel} sequences" if asked.parallel > 1 else ""
    say.result(
        f"{asked.job.name}, context {asked.context:,}{many}, {asked.runtime.name}, on: {asked.machine.said}"
    )
    say.result()
    if best is None:
        _nothing(found)
        return
    left = "as it is" if best.recipe.startswith("hf-") else best.recipe
    say.result(
        f"{_short(best.model)}: {left}, keys and values as {best.kv}"
        if asked.job.name != "finetune"
        else f"{_short(best.model)}: {left}"
    )
    for line in numbers(best, asked.parallel):
        say.result(f"  {line}")
    say.result()
    for title, lines in (("why", found.why), ("but", found.caution)):
        for i, line in enumerate(lines):
            say.result(f"{title if not i else '':<5}{line}")
    if chose_runtime:
        use, why, source = runtime_for(asked.job, asked.machine)
        say.result(f"     {use}: {why} ({source})")
    if found.runner_up is not None:
        second = found.runner_up
        say.result(f"\nsecond: {_short(second.model)}: {second.recipe}, {second.kv}; {found.lost}")
    made, run = command(found, out), running(found, out)
    if made is not None:
        say.result(f"\nmake:  {made}")
    if run is not None:
        say.result(f"run:   {run}")
    say.result("\nall that was weighed")
    say.result(table(found))


def numbers(option: Option, parallel: int = 1) -> list[str]:
    """The answer's numbers, each with its class."""
    from bitmill.advise.cliff import shown

    where, each = PLACES[option.memory.place], f" for each of {parallel}" if parallel > 1 else ""
    lines = [
        f"{option.bpw:.2f} bits a weight, {option.bits:.2f} in the linears (computed from shapes)",
        f"{say.size(option.memory.bytes_)} of {say.size(option.there_bytes)} of {where}, headroom left "
        "(modelled)",
    ]
    split = option.split
    if split is not None:
        kind = f"experts of {split.of - split.layers} layers beside the card" if split.experts_off else ""
        parted = f"{split.layers} of {split.of} layers on the card" if 0 < split.layers < split.of else ""
        said = kind or parted
        lines.append(f"{shown(split.decode, ' tokens/s')}{each}{f', {said}' if said else ''} (modelled)")
        if split.prefill is not None:
            lines.append(f"the whole context read{each} in {shown(split.prefill, ' s')} (modelled)")
    lines.append(f"{option.loss}: {option.loss.source}")
    return lines


def table(found: Advice) -> str:
    """What was weighed: one line an option that stands for its model and recipe."""
    from bitmill.advise.cliff import shown

    rows = []
    low = found.chosen is None or not found.chosen.last
    for option in found.tried:
        if option.last and low:
            continue
        mark = "*" if option is found.chosen else ""
        rate = "–" if option.split is None else shown(option.split.decode)
        against = option.against[0].partition(":")[0] if option.against else ""
        names = (_short(option.model), option.recipe, option.kv)
        sizes = (f"{option.bpw:.2f}", say.size(option.memory.bytes_))
        rows.append([mark, *names, *sizes, rate, f"{option.loss.kld:.2g}", against])
    head = ["", "model", "recipe", "cache", "bpw", "memory", "tokens/s", "KLD", "against"]
    hidden = sum(option.last for option in found.tried) if low else 0
    note = f"\nand {hidden} of fewer bits, with --json" if hidden else ""
    return say.table(head, rows, right=(4, 5)) + note


def _nothing(found: Advice) -> None:
    if not found.shorter:
        say.result("nothing fits, at any context: a smaller model, or a larger machine")
    else:
        say.result(f"nothing fits with a context of {found.asked.context:,}. This would:")
    for option, context in found.shorter:
        faults = f"; {option.against[0]}" if option.against else ""
        said = f"{_short(option.model)}: {option.recipe}, cache {option.kv}, context {context:,}"
        say.result(f"  {said}{faults}")
    say.result("\nall that was weighed")
    say.result(table(found))
