"""``bitmill plots``: the pictures of a measurement or a sweep as files, for papers."""

from __future__ import annotations

import json as reading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.options import Force, Json
from bitmill.core.errors import BadFile, Refused

LARGEST = 256 << 20

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="What `bitmill measure --json` wrote (or quantize, or a sweep beside its files), or a sweep's "
        "folder.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path, typer.Option("-o", "--out", metavar="DIR", help="Where the pictures go.", show_default=False)
]


def plots(
    source: Source,
    out: Folder,
    png: Annotated[
        bool, typer.Option("--png", help="PNG files, too; needs pip install 'bitmill[png]'.")
    ] = False,
    width: Annotated[int, typer.Option("--width", min=100, max=8000, help="Of a PNG, in pixels.")] = 1760,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Name the pictures there would be; write nothing.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the pictures of a measurement or a sweep as SVG and PNG files, light, with their style inside.

    Of a measurement: loss by kind of text, its distribution, by the original's confidence, all weights. Of a
    sweep, or of several files measured together: size against loss, and the distributions in one picture.

        bitmill measure q4.gguf --against smollm2 --json > account.json
        bitmill plots account.json -o figures --png
        bitmill plots ladder -o figures
    """
    from bitmill.pages.pictures import as_png

    try:
        pictures = _pictures(source)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadFile(
            "this is not what a measurement or a sweep leaves",
            where=str(source),
            fix="measure again, with --json",
        ) from error
    files: dict[str, bytes] = {f"{name}.svg": svg.encode() for name, svg in pictures.items()}
    if png:
        files |= {f"{name}.png": b"" if dry_run else as_png(svg, width) for name, svg in pictures.items()}
    there = [name for name in files if (out / name).exists()]
    if there and not force:
        raise Refused(f"{str(out / there[0])!r} exists", fix="add --force to replace it")
    for name, content in {} if dry_run else files.items():
        _put(out / name, content)
    if json:
        say.emit({"folder": str(out), "written": not dry_run, "files": list(files)})
        return
    say.result("\n".join(str(out / name) for name in files))


def _pictures(source: Path) -> Mapping[str, str]:
    from bitmill.pages.pictures import of_record, of_several

    if source.is_dir():
        told = _read(source / "sweep.json")
        tiers = sorted(told["tiers"], key=lambda tier: int(tier["bytes"]))
        beside = [source / f"{Path(str(tier['file'])).name}.measured.json" for tier in tiers]
        records = [_read(file)["record"] for file in beside if file.is_file()]
        return of_several(tiers, records, told["budget"])
    told = _read(source)
    if isinstance(told, list):
        return _beside_each_other([one["measurement"] for one in told])
    if "records" in told:
        return _beside_each_other(told["records"])
    record = told.get("measurement") or told.get("record") or told
    report = told.get("report") or told
    weighted = report.get("weighted")
    return of_record(record, weighted if isinstance(weighted, dict) else {})


def _beside_each_other(records: list[Any]) -> Mapping[str, str]:
    """Of several measurements; where they stand is said of their means alone."""
    from bitmill.pages.pictures import of_several
    from bitmill.sweep.front import Point, standings

    names = [str(record["quantized"]["name"]) for record in records]
    told = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]
    points = [Point(n, int(r["bytes"]), float(r["kld"]["mean"])) for n, r in zip(told, records, strict=True)]
    where = standings(points)
    tiers = [
        {"name": n, "standing": where[n].to_json(), **{key: r[key] for key in ("bytes", "kld", "same_top")}}
        for n, r in zip(told, records, strict=True)
    ]
    return of_several(tiers, records)


def _read(file: Path) -> Any:
    try:
        if file.stat().st_size > LARGEST:
            raise Refused(f"{file.name} is larger than any measurement", where=str(file))
        return reading.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"cannot read {str(file)!r}: {error.strerror}") from error
    except RecursionError as error:
        raise BadFile("this is no JSON of ours", where=str(file)) from error


def _put(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise Refused(f"cannot write {str(path)!r}: {error.strerror}", fix="choose another -o") from error
