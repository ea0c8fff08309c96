"""``bitmill sweep``: many recipes of one model, made, measured on the same text, and weighed against each
other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import page, say
from bitmill.cli.options import (
    Calib,
    Chat,
    Device,
    DryRun,
    Force,
    Json,
    Length,
    Model,
    Revision,
    Samples,
    Seed,
    Text,
)
from bitmill.cli.progress import Teller
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.advise.speed import Speed
    from bitmill.sweep.run import Asked, Outcome, Prospect

USUAL_CONTEXT = 4096
PAGE = "index.html"
LONGEST = 16  # characters of a name in the table
BENCHED: Mapping[str, Any] = {"prompt": 256, "generated": 32, "repeats": 3}

Recipes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE]...",
        help="Names people use (Q4_K_M, W4A16), lines, or .toml files; beside a --ladder or instead.",
        show_default=False,
    ),
]
Ladder = Annotated[
    str | None,
    typer.Option(
        "--ladder", metavar="gguf|serving|all",
        help="The recipes that people publish together. What a shape rules out is left out and named.",
        show_default=False,
    ),
]  # fmt: skip
Folder = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", "--output-dir",
        help="The sweep's folder: outputs, their measurements, sweep.json, index.html. [default: "
        "MODEL-sweep]",
        show_default=False,
    ),
]  # fmt: skip
Importance = Annotated[
    bool,
    typer.Option(
        "--importance/--no-importance",
        help="GGUF: one importance matrix for every recipe it can tell something, as publishers do; "
        "without, for those alone that cannot do without.",
    ),
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes that share the cores.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS",
        help="A Ray cluster that sees the folder: its address, auto, or local (local:2 for two workers).",
        show_default=False,
    ),
]  # fmt: skip
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="SIZE", help="Name what loses least in at most this: 4.2GB.", show_default=False
    ),
]
Bench = Annotated[
    bool | None,
    typer.Option(
        "--bench/--no-bench",
        help="Time every GGUF output in llama.cpp, afterwards and alone; otherwise speed is modelled. "
        "[default: where llama-cpp-python is installed]",
        show_default=False,
    ),
]


def sweep(
    model: Model,
    recipe: Recipes = None,
    ladder: Ladder = None,
    out: Folder = None,
    calib: Calib = None,
    nsamples: Samples = 128,
    seqlen: Length = 512,
    seed: Seed = 0,
    chat: Chat = False,
    device: Device = "cpu",
    importance: Importance = True,
    text: Text = None,
    window: Annotated[int, typer.Option("--window", min=4, help="Tokens of a window measured.")] = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of each kind of text.")] = 12,
    budget: Budget = None,
    bench: Bench = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    revision: Revision = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Make many recipes of MODEL, measure them on the same text, and say which are worth taking.

    One importance matrix, one run of the original. The table has size, loss with its interval, and speed;
    what nothing beats is the front, its knee is where more bytes stop paying, and what is beaten says by
    what. A sweep that is stopped goes on where it was when the same command is given again: a finished
    output is not made or measured twice.

        bitmill sweep smollm2 --ladder gguf -o ladder
        bitmill sweep ./my-model Q4_K_M "best : Q4_K_M" W4A16 --budget 4.2GB
        bitmill sweep org/name --ladder serving --jobs 4 --dry-run
    """
    from bitmill.core.sizes import size_of
    from bitmill.measurement.measure import Protocol
    from bitmill.measurement.states import Kept
    from bitmill.source import locate
    from bitmill.sweep import run
    from bitmill.sweep.errand import Drawn, Measuring
    from bitmill.sweep.result import WORK
    from bitmill.sweep.tiers import stem

    if ray is not None and jobs > 1:
        raise Refused("--jobs and --ray are two answers to one question", fix="give one of them")
    folder = out or Path(f"{stem(locate(model, revision=revision))}-sweep")
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{str(folder)!r} is a file", fix="name a folder with -o")
    drawn = Drawn(tuple(calib) if calib else None, nsamples, seqlen, seed, chat, device)
    protocol = Protocol(window=window, count=windows, seed=seed)
    measuring = Measuring(tuple(text) if text else None, protocol, Kept(folder / WORK / "original"))
    asked = run.Asked(
        model=model,
        recipes=(*(recipe or ()), *rungs(ladder)),
        folder=folder,
        drawn=drawn,
        measuring=measuring,
        revision=revision,
        importance=importance,
        forgiving=ladder is not None,
        jobs=jobs,
        ray=ray,
        budget=0 if budget is None else size_of(budget),
        force=force,
    )
    found = run.prospect(asked)
    if dry_run:
        say.emit(_prospect(found)) if json else _show_prospect(asked, found)
        return
    _headline(asked, found)
    with Teller() as teller:
        made = _timed(run.sweep(asked, found, teller, say.note), bench, teller)
        path = run.write(made)
        made_page = page.of_sweep(made, remarks(made.to_json()), made.to_json()["command"], teller)
    say.emit(made.to_json()) if json else show(made)
    say.note(f"all numbers: {path}")
    page.put(made_page, folder / PAGE, "-o")


def rungs(ladder: str | None) -> tuple[str, ...]:
    """The recipes of a ladder by its name."""
    from bitmill.sweep.tiers import LADDERS

    if ladder is None:
        return ()
    if ladder.lower() not in LADDERS:
        raise Refused(f"there is no ladder {ladder!r}", fix=f"one of: {', '.join(LADDERS)}")
    return LADDERS[ladder.lower()]


def _timed(made: Outcome, bench: bool | None, teller: Teller) -> Outcome:
    """The outcome with speeds: measured where that is asked for or can be, else modelled."""
    from dataclasses import replace
    from importlib.util import find_spec

    from bitmill.advise.machine import machine
    from bitmill.advise.speed import measured, modelled

    there = machine(None)
    installed = find_spec("llama_cpp") is not None
    if bench and not installed:
        raise Refused(
            "--bench times files in llama.cpp, which is not installed", fix="pip install llama-cpp-python"
        )
    speeds: dict[str, Speed] = {}
    for at, result in enumerate(made.results):
        teller("bench", at, len(made.results), result.name)
        path = made.asked.folder / result.file
        try:
            if installed and bench is not False and path.suffix == ".gguf":
                speeds[result.name] = measured(path, **BENCHED)
            else:
                speeds[result.name] = modelled(path, there, USUAL_CONTEXT, USUAL_CONTEXT)
        except Refused as refusal:
            say.note(f"no speed of {result.name}: {refusal.what}")
    teller("bench", len(made.results), len(made.results), "")
    return replace(made, speeds=speeds)


def _headline(asked: Asked, found: Prospect) -> None:
    takes = found.forecast
    say.note(
        f"{len(found.placed)} tiers into {asked.folder}: {say.size(takes.disk_bytes)}, about "
        f"{say.duration(takes.seconds)} one after the other (modelled)"
    )
    for one in found.left:
        say.note(f"left out: {one.name}: {one.why}")


def _prospect(found: Prospect) -> dict[str, Any]:
    lines = zip(found.placed, found.forecast.making, strict=True)
    return {
        "tiers": [
            {
                "name": p.tier.name,
                "recipe": str(p.tier.recipe),
                "file": p.tier.file,
                "bytes": p.plan.bytes_,
                "bpw": p.plan.bpw,
                "calibrated_on": p.told,
                "seconds": seconds,
            }
            for p, seconds in lines
        ],
        "left_out": [vars(one) for one in found.left],
        "forecast": found.forecast.to_json(),
    }


def _show_prospect(asked: Asked, found: Prospect) -> None:
    plain = _prospect(found)
    rows = [
        (
            t["name"],
            say.size(t["bytes"]),
            f"{t['bpw']:.2f}",
            t["calibrated_on"],
            say.duration(t["seconds"]),
        )
        for t in plain["tiers"]
    ]
    say.result(say.table(("tier", "size", "bits", "calibrated on", "making"), rows, right=(1, 2, 4)))
    takes = found.forecast
    say.result()
    say.result(f"into {asked.folder}: {say.size(takes.disk_bytes)}")
    parts = (
        f"calibrating {say.duration(takes.calibrating)}",
        f"the original's logits {say.duration(takes.reference)}",
        f"making {say.duration(sum(takes.making))}",
        f"measuring {len(takes.making)} × {say.duration(takes.measuring)}",
    )
    say.result(f"about {say.duration(takes.seconds)}, modelled: {', '.join(parts)}")
    if asked.drawn.calib is None and any(p.told != "nothing" for p in found.placed):
        say.result("the first calibration of a model also samples its own words, once, which is not in this")
    say.result(f"about {takes.peak_bytes / 2**30:.1f} GiB of memory (modelled)")
    for one in found.left:
        say.result(f"left out: {one.name}: {one.why}")


def show(made: Outcome) -> None:
    """The table for a reader, then what to take from it."""
    plain = made.to_json()
    rows = [_row(tier) for tier in plain["tiers"]]
    head = ("tier", "size", "bits", "KL divergence", "same", "tokens/s", "")
    say.result(say.table(head, rows, right=(1, 2, 3, 4, 5)))
    say.result()
    for line in remarks(plain):
        say.result(line)


def _row(tier: Mapping[str, Any]) -> tuple[str, ...]:
    from bitmill.measurement.report import give, half_width

    decode = (tier["speed"] or {}).get("decode")
    return (
        say.shortened(tier["name"], LONGEST),
        say.size(tier["bytes"]),
        f"{tier['bpw']:.2f}",
        give(tier["kld"]["mean"], half_width(tier["kld"])),
        f"{100 * tier['same_top']:.1f} %",
        "?" if decode is None else rate(decode),
        standing(tier["standing"]),
    )


def rate(found: Mapping[str, Any]) -> str:
    """``31 ± 2`` measured, ``31–58`` modelled."""
    ends = found["ci95"]
    if ends is None:
        return f"{found['mean']:.3g}"
    if not found["repeats"]:
        return "–".join(f"{end:.0f}" if end >= 10 else f"{end:.1f}" for end in ends)
    half = (ends[1] - ends[0]) / 2
    return f"{found['mean']:.0f} ± {half:.0f}" if half >= 1 else f"{found['mean']:.1f} ± {half:.1f}"


def standing(found: Mapping[str, Any]) -> str:
    """Where a tier stands, in a few words."""
    if found["knee"]:
        return "front, knee"
    if found["front"]:
        return "front"
    sure = "" if found["settled"] else " ~"
    return f"beaten by {say.shortened(found['beaten_by'], LONGEST)}{sure}"


def remarks(plain: Mapping[str, Any]) -> list[str]:
    """What the table means, in sentences."""
    floor = plain["floor"]
    lines = [
        f"KL divergence in nats a token, 95 % interval over windows, on {plain['tokens']:,} tokens"
        + (f"; noise floor {floor:.2g}" if floor else "")
    ]
    knee = next((t["name"] for t in plain["tiers"] if t["standing"]["knee"]), None)
    if any(t["standing"]["beaten_by"] and not t["standing"]["settled"] for t in plain["tiers"]):
        lines.append("~ beaten within chance: their paired interval holds zero")
    if knee is not None:
        lines.append(f"knee: {knee}; beyond it more bytes buy less")
    if plain["budget"]:
        best = plain["best_within_budget"]
        said = f"least loss in {say.size(plain['budget'])}: {best}"
        lines.append(said if best else f"nothing fits into {say.size(plain['budget'])}")
    kinds = {t["speed"]["evidence"]: t["speed"]["runtime"] for t in plain["tiers"] if t["speed"]}
    lines += [f"tokens a second: {kind}, {runtime}" for kind, runtime in kinds.items()]
    close = [
        f"{n['smaller']} and {n['larger']}"
        for n in plain["neighbours"]
        if n["kld_difference_ci95"] is not None
        and n["kld_difference_ci95"][0] <= 0 <= n["kld_difference_ci95"][1]
    ]
    if close:
        lines.append(f"no difference beyond chance: {'; '.join(close)}")
    lines += [f"left out: {one['name']}: {one['why']}" for one in plain["left_out"]]
    return lines
