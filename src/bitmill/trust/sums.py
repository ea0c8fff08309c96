"""Checksums of a model's files: SHA256SUMS as coreutils writes it, made and compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bitmill.checkpoint.digests import sha256_of
from bitmill.core.errors import BadFile, Refused
from bitmill.trust.findings import Finding

NAME = "SHA256SUMS"
_LINE = re.compile(r"(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_MOST = 4 << 20  # bytes of a manifest

Tell = Callable[[str, int, int, str], None]
"""``tell(event, done, total, text)``."""


def manifest_of(path: Path) -> Path:
    """Where the checksums of a folder, or of one file, stand."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.name}.sha256")


def write_manifest(path: Path, tell: Tell) -> Path:
    """Write the checksums of every file of a folder, or of one file; the manifest's path.

    Raises:
        Refused: there is nothing to sum, or no room for it.
    """
    files = _files(path)
    if not files:
        raise Refused("there are no files to sum", where=str(path))
    lines = []
    for at, file in enumerate(files, 1):
        tell("sums", at, len(files), file.name)
        lines.append(f"{sha256_of(file)}  {file.name}\n")
    made = manifest_of(path)
    try:
        made.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise Refused(f"cannot write {made.name}: {error.strerror}", where=str(made)) from error
    return made


def compare(path: Path, tell: Tell) -> tuple[Finding, ...]:
    """Compare the files with their manifest; nothing where there is none.

    Raises:
        BadFile: the manifest is none.
    """
    manifest = manifest_of(path)
    if not manifest.is_file():
        return ()
    said = _read(manifest)
    folder = manifest.parent
    found: list[Finding] = []
    for at, (name, expected) in enumerate(said.items(), 1):
        tell("sums", at, len(said), name)
        file = folder / name
        if not file.is_file():
            found.append(
                Finding("error", "manifest", "it is listed and missing", str(file), "fetch it again")
            )
        elif sha256_of(file) != expected:
            found.append(
                Finding("error", "manifest", "its SHA-256 is not the one listed", str(file), "fetch it again")
            )
    unlisted = sorted({file.name for file in _files(path)} - said.keys())
    if unlisted:
        found.append(
            Finding("warning", "manifest", f"{NAME} does not list {', '.join(unlisted[:3])}"
                    + (f" and {len(unlisted) - 3} more" if len(unlisted) > 3 else ""), str(manifest),
                    "write it anew: --write-manifest")
        )  # fmt: skip
    return tuple(found)


def _files(path: Path) -> list[Path]:
    """The files that a manifest covers: a folder's own, hidden ones and the manifest left out; or the one."""
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.name != NAME and not file.name.startswith(".")
    )


def _read(manifest: Path) -> dict[str, str]:
    if manifest.stat().st_size > _MOST:
        raise BadFile("it is too large for a list of checksums", where=str(manifest))
    found: dict[str, str] = {}
    for number, line in enumerate(manifest.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        name = match["name"] if match is not None else ""
        if match is None or not name or any(c in name for c in "/\\\0") or name.startswith("."):
            raise BadFile(
                f"line {number} is not a checksum and the name of a file in this folder", where=str(manifest)
            )
        found[name] = match["sum"].lower()
    return found
