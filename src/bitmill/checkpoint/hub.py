"""Models from the Hugging Face hub: only weights, configuration and tokenizer files are ever fetched.

Pickled weights and Python files are not on the list, so they never reach the disk.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bitmill.checkpoint.hf_folder import CARRIED, CONFIG
from bitmill.core.errors import BitmillError, Refused

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<part>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
_MODEL_FILES = (
    CONFIG,
    "quantize_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *CARRIED,
)
_OTHER_PARTS = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` is ``org/name``, perhaps with ``:file-or-quant`` and ``@revision``."""
    return _ID.fullmatch(text) is not None


def fetch(text: str, revision: str | None = None) -> Path:
    """The local folder, or GGUF file, of a hub id; files that are already here are not fetched again.

    Args:
        text: ``org/name[:part][@revision]``; ``part`` is a GGUF file's name or the quant in it (``Q4_K_M``).
        revision: branch, tag or commit, when the id names none.

    Raises:
        Refused: no such model, no access, no network, or nothing in it that could be read.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise Refused(f"{text!r} is not a hub id", fix="org/name, org/name:Q4_K_M or org/name@revision")
    repo, part = match["repo"], match["part"]
    if revision and match["revision"] and revision != match["revision"]:
        raise Refused(
            f"{text!r} names one revision and --revision={revision} another", fix="keep one of them"
        )
    try:
        folder = snapshot_download(
            repo, revision=match["revision"] or revision, allow_patterns=list(_patterns(part))
        )
    except (OSError, HFValidationError) as error:
        raise _refusal(repo, match["revision"] or revision, error) from error
    return _chosen(Path(folder), repo, part)


def fetch_config(text: str, revision: str | None = None) -> Path:
    """The ``config.json`` of a hub id, and nothing else of it.

    Raises:
        Refused: no such model, no access, no network, or it has none.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise Refused(f"{text!r} is not a hub id", fix="org/name or org/name@revision")
    wanted = match["revision"] or revision
    try:
        return Path(hf_hub_download(match["repo"], CONFIG, revision=wanted))
    except (OSError, HFValidationError) as error:
        raise _refusal(match["repo"], wanted, error) from error


def _patterns(part: str | None) -> tuple[str, ...]:
    if part is None:
        return _MODEL_FILES
    if part.lower().endswith(".gguf"):
        return (part,)
    return tuple(f"*{spelling}*.gguf" for spelling in sorted({part, part.lower(), part.upper()}))


def _chosen(folder: Path, repo: str, part: str | None) -> Path:
    if part is None:
        if not (folder / CONFIG).is_file():
            raise Refused(
                f"{repo} has no config.json: it may hold GGUF files only",
                where=str(folder),
                fix=f"say which one: {repo}:Q4_K_M, or {repo}:name-of-the-file.gguf",
            )
        return folder
    wanted = part.lower() if part.lower().endswith(".gguf") else None
    quant = re.compile(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = sorted(
        p for p in folder.rglob("*.gguf") if (p.name.lower() == wanted if wanted else quant.search(p.name))
    )
    first = [p for p in found if not _OTHER_PARTS.search(p.name) or "-00001-of-" in p.name]
    if len(first) != 1:
        listed = ", ".join(p.name for p in first) or "none"
        raise Refused(
            f"{len(first)} GGUF files of {repo} match {part!r}: {listed}", fix="give one file's full name"
        )
    return first[0]


def _refusal(repo: str, revision: str | None, error: Exception) -> BitmillError:
    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, GatedRepoError):
        return Refused(
            f"{repo} asks for its licence to be accepted",
            fix=f"accept it at https://huggingface.co/{repo}, then `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return Refused(f"{repo} has no revision {revision!r}", fix="drop @revision for the newest")
    if isinstance(error, RepositoryNotFoundError):
        return Refused(
            f"the hub has no public model {repo!r}",
            fix="check the spelling; for a private one, `hf auth login` first",
        )
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return Refused(
            f"the hub cannot be reached, and {repo}{at} is not in the local cache",
            fix="give a local folder or .gguf file instead: bitmill quantize ./my-model …",
        )
    return Refused(f"cannot fetch {repo}{at}: {error}", fix="give a local folder or .gguf file instead")
