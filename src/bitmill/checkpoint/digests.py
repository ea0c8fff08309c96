"""Checksums of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bitmill.core.errors import BadFile

_CHUNK = 4 << 20


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, a piece of it in memory at a time.

    Raises:
        BadFile: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as data:
            while chunk := data.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise BadFile(f"cannot read the file: {error.strerror}", where=str(file)) from error
    return digest.hexdigest()
