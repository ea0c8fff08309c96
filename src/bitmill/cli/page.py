"""Writing pages: of a measured file, of files measured together, of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.progress import Teller
from bitmill.core.errors import Refused

if TYPE_CHECKING:
    from bitmill.cli.measure import How
    from bitmill.core.axes import Checkpoint
    from bitmill.measurement.record import Record
    from bitmill.sweep.run import Outcome

Tell = Callable[[str, int, int, str], None]

Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE.html",
        help="Write a page to look at: of the file, or of all files beside each other.",
        show_default=False,
    ),
]


def put(text: str, path: Path, option: str = "--html") -> None:
    """Write a page and say where."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(
            f"cannot write {str(path)!r}: {error.strerror}", fix=f"choose another {option}"
        ) from error
    say.note(f"page: {path}")


def refuse(path: Path | None) -> None:
    """Refuse a page that has no place, before anything is measured."""
    if path is None:
        return
    if path.is_dir():
        raise Refused(f"--html {str(path)!r} is a folder", fix=f"name a file: --html {path / 'page.html'}")
    if not path.absolute().parent.is_dir():
        raise Refused(
            f"--html {str(path)!r}: there is no such folder", fix="make it, or choose another --html"
        )


def measured(
    records: Sequence[Record],
    files: Sequence[str],
    against: str,
    how: How,
    path: Path,
    made_by: Sequence[str] = (),
) -> None:
    """Write the page of one measured file, or of several beside each other.

    Args:
        made_by: the commands that made the files; taken from their reports where none are given.
    """
    from bitmill.cli.again import measure_command
    from bitmill.source import open_source

    command = measure_command(files, against, how)
    reference = open_source(against, revision=how.revision)
    with Teller() as teller:
        text = _of_records(records, files, reference, [*made_by, command], teller)
    put(text, path)


def _of_records(
    records: Sequence[Record],
    files: Sequence[str],
    reference: Checkpoint,
    commands: Sequence[str],
    tell: Tell,
) -> str:
    from bitmill.cli.again import reported_command
    from bitmill.pages.beside import beside, report_of
    from bitmill.pages.record import page
    from bitmill.source import locate

    if len(records) > 1:
        return _beside_each_other(records, files, reference, commands, tell)
    plain, path = records[0].to_json(), locate(files[0])
    known = reported_command(report_of(path), reference.path.name, path) if len(commands) == 1 else None
    found = [known, *commands] if known is not None else commands
    return page(plain, beside(plain, path, reference, found, _looking(tell)))


def _beside_each_other(
    records: Sequence[Record],
    files: Sequence[str],
    reference: Checkpoint,
    commands: Sequence[str],
    tell: Tell,
) -> str:
    from bitmill.measurement.compare import compare
    from bitmill.pages.beside import panels, report_of, weighted
    from bitmill.pages.choice import Choice, page
    from bitmill.pages.memory import stack
    from bitmill.source import locate
    from bitmill.sweep.front import Point, standings

    named = dict(zip(_names(records), records, strict=True))
    paths = dict(zip(named, map(locate, files), strict=True))
    order = sorted(named, key=lambda name: (named[name].bytes_, named[name].summary.kld.mean))
    points = [Point(name, named[name].bytes_, named[name].summary.kld.mean) for name in order]
    where = standings(points, lambda one, other: compare(named[one], named[other]).ci95)
    plain = {name: named[name].to_json() for name in order}
    picked = min(order, key=lambda name: plain[name]["kld"]["mean"])
    stacks = [stack(paths[name]) for name in order]
    choice = Choice(
        title=f"{' and '.join(order) if len(order) == 2 else f'{len(order)} files'} beside each other",
        tiers=[_tier(name, plain[name], where[name].to_json()) for name in order],
        records=[plain[name] for name in order],
        weighted=[weighted(report_of(paths[name])) for name in order],
        picked=picked,
        memory=[s for s in stacks if s is not None] if None not in stacks else [],
        panels=panels(plain[picked], paths[picked], reference, _looking(tell)),
        differences=[_difference(named, a, b) for a, b in pairwise(order)],
        commands=commands,
        report=report_of(paths[picked]),
    )
    return page(choice)


def _tier(name: str, plain: Mapping[str, Any], standing: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("bytes", "bpw", "kld", "same_top", "same_top_se")
    told = plain["calibration"] or {}
    said = f"{told['tokens']:,} tokens" if told.get("tokens") else "nothing that is known"
    return {
        "name": name,
        "recipe": plain["quantized"]["digest"],
        "calibrated_on": said,
        **{key: plain[key] for key in keys},
        "standing": standing,
        "speed": None,
    }


def _difference(named: Mapping[str, Record], one: str, other: str) -> tuple[str, str, str]:
    from bitmill.measurement.compare import compare
    from bitmill.measurement.report import give

    found = compare(named[one], named[other])
    half = None if found.ci95 is None else (found.ci95[1] - found.ci95[0]) / 2
    better = one if found.kld_difference < 0 else other
    verdict = f"{better} is better" if found.settled else "no difference beyond chance"
    flips = f"right alone {found.only_first} and {found.only_second}, McNemar p = {found.mcnemar_p:.2g}"
    return one, other, f"{give(found.kld_difference, half)}: {verdict}; {flips}"


def _names(records: Sequence[Record]) -> list[str]:
    """Names of the files, told apart where two are the same."""
    names = [record.quantized.name for record in records]
    return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def of_sweep(made: Outcome, remarks: Sequence[str], command: str, tell: Tell) -> str:
    """The page of a sweep: its choice, and a closer look at the best within the budget, or the knee."""
    from bitmill.pages.beside import panels
    from bitmill.pages.choice import Choice, page
    from bitmill.pages.memory import stack

    plain = made.to_json()
    knee = next((n for n, where in made.standings.items() if where.knee), None)
    front = [r.name for r in made.results if made.standings[r.name].front]
    picked = made.best or knee or front[len(front) // 2]
    chosen = next(r for r in made.results if r.name == picked)
    folder = made.asked.folder
    stacks = [stack(folder / r.file) for r in made.results]
    known = [s for s in stacks if s is not None]
    choice = Choice(
        title=f"{len(made.results)} recipes of {chosen.record['reference']['name']}",
        tiers=plain["tiers"],
        records=[r.record for r in made.results],
        weighted=[r.report.get("weighted") or {} for r in made.results],
        picked=picked,
        memory=known if len(known) == len(stacks) else [],
        panels=panels(chosen.record, folder / chosen.file, made.source, _looking(tell)),
        budget=plain["budget"],
        remarks=remarks,
        differences=[_pair(pair) for pair in plain["neighbours"]],
        commands=[command],
        report=chosen.report,
    )
    return page(choice)


def _pair(found: Mapping[str, Any]) -> tuple[str, str, str]:
    ends = found["kld_difference_ci95"]
    if ends is None:
        return found["smaller"], found["larger"], "not known"
    settled = not ends[0] <= 0.0 <= ends[1]
    better = found["larger"] if ends[0] > 0 else found["smaller"]
    verdict = f"{better} is better" if settled else "no difference beyond chance"
    return found["smaller"], found["larger"], f"{ends[0]:.4g} to {ends[1]:.4g}: {verdict}"


def _looking(tell: Tell) -> Callable[[int, int], None]:
    return lambda done, total: tell("panels", done, total, "")
