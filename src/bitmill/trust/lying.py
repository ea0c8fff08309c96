"""What else lies in a model folder: pickles, programs, links that lead outside, files that nothing names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitmill.checkpoint.hf_folder import CONFIG, INDEX, PICKLED, inside, read_object
from bitmill.core.errors import BadFile
from bitmill.trust.findings import Finding, of_error

_PROGRAMS = (".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".jar")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")
_HOOKED = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
           "generation_config.json", "feature_extractor_config.json")  # fmt: skip
"""Files in which ``auto_map`` names classes of the folder's own code."""
_MOST_FILES = 10_000
_LISTED = 3


def look_around(folder: Path) -> tuple[Finding, ...]:
    """Everything in a folder that is not the model's numbers; names only are looked at, and small JSON."""
    try:
        names = sorted(_below(folder))
    except OSError as error:
        return (Finding("error", "files", f"the folder cannot be listed: {error.strerror}", str(folder)),)
    if len(names) > _MOST_FILES:
        return (Finding("error", "files", f"more than {_MOST_FILES:,} files are no model", str(folder), ""),)
    return (*_links(folder, names), *_kinds(folder, names), *_hooks(folder), *_unindexed(folder))


def _below(folder: Path) -> Iterator[str]:
    """Files below a folder by their relative names; links to folders are named and not followed."""
    count = 0
    for root, folders, files in os.walk(folder, followlinks=False):
        linked = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (*files, *linked):
            yield (Path(root) / name).relative_to(folder).as_posix()
            count += 1
            if count > _MOST_FILES:
                return


def _links(folder: Path, names: list[str]) -> Iterator[Finding]:
    for name in names:
        if "/" in name or name.startswith(".") or not (folder / name).is_symlink():
            continue
        try:
            inside(folder, name)
        except BadFile as error:
            yield of_error(error, "files")


def _kinds(folder: Path, names: list[str]) -> Iterator[Finding]:
    pickled = [name for name in names if name.lower().endswith(PICKLED) and not name.startswith(".git/")]
    safe = any(name.endswith((".safetensors", ".gguf")) for name in names)
    if pickled:
        yield Finding(
            "warning" if safe else "error",
            "files",
            f"{len(pickled)} pickled file{'s' * (len(pickled) > 1)}: loading one can run any code it contains"
            + ("; loaders that prefer safetensors leave them" if safe else ""),
            _listed(pickled),
            "delete what is not needed" if safe else "a version of the model in safetensors or GGUF",
        )
    programs = [name for name in names if name.lower().endswith(_PROGRAMS)]
    if programs:
        yield Finding(
            "warning", "files", "programs lie beside the model; none is needed to run it", _listed(programs),
            "delete them unless you know what they are",
        )  # fmt: skip
    packed = [name for name in names if name.lower().endswith(_ARCHIVES)]
    if packed:
        yield Finding("warning", "files", "archives are not looked into", _listed(packed), "unpack or delete")
    python = [name for name in names if name.endswith(".py")]
    if python and not any(True for _ in _hooks(folder)):
        yield Finding(
            "note", "code", "Python files lie beside the model, and nothing names them", _listed(python), ""
        )


def _hooks(folder: Path) -> Iterator[Finding]:
    """Places where a loader is told to run the folder's own code."""
    for name in _HOOKED:
        if not (folder / name).is_file():
            continue
        try:
            said = read_object(inside(folder, name))
        except BadFile as error:
            if name != CONFIG:
                yield of_error(error, "structure")
            continue
        for key in ("auto_map", "custom_pipelines", "model_file"):
            if said.get(key):
                yield Finding(
                    "warning",
                    "code",
                    f"{key} names code in the folder ({_code(said[key])}): loaders that are told to trust it "
                    "run it",
                    f"{folder / name}: {key}",
                    "leave trust_remote_code off; where the architecture needs it, read the code first",
                )


def _code(value: Any) -> str:
    texts = sorted(str(v) for v in value.values()) if isinstance(value, Mapping) else [str(value)]
    return _listed(texts)


def _unindexed(folder: Path) -> Iterator[Finding]:
    """Files of weights that the index leaves out, and sizes that it has wrong."""
    if not (folder / INDEX).is_file():
        return
    try:
        index = read_object(inside(folder, INDEX))
    except BadFile as error:
        yield of_error(error, "structure")
        return
    places = index.get("weight_map")
    if not isinstance(places, dict):
        return
    named = {str(name) for name in places.values()}
    there = {path.name for path in folder.glob("*.safetensors")}
    if there - named:
        yield Finding(
            "warning", "files", "the index leaves these files of weights out: some loaders read them all",
            _listed(sorted(there - named)), "delete them",
        )  # fmt: skip
    about = index.get("metadata")
    said = about.get("total_size") if isinstance(about, dict) else None
    if type(said) is int and said > 0 and named <= there:
        held = sum((folder / name).stat().st_size for name in named)
        if not 0.9 * held <= said <= held:
            yield Finding(
                "warning", "files", f"the index announces {said:,} bytes; the files have {held:,}",
                str(folder / INDEX), "fetch index and files of one revision",
            )  # fmt: skip


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
