"""A sweep's folder as people publish it: checksums, a model card with what was measured, a picture."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bitmill.checkpoint.digests import sha256_of
from bitmill.core.errors import Refused
from bitmill.measurement.report import give, half_width, percent, size
from bitmill.pages.frontier import frontier
from bitmill.pages.paper import on_paper
from bitmill.sweep.result import result_path
from bitmill.sweep.words import MATRIX

SWEEP, CARD, SUMS, PLOT, PAGE = "sweep.json", "README.md", "SHA256SUMS", "size-loss.svg", "index.html"
_LARGEST = 256 << 20
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_OURS = "<!-- made by bitmill publish -->"


@dataclass(frozen=True, eq=False)
class Folder:
    """What a folder would be published as.

    Attributes:
        path: the sweep's folder.
        sweep: plain values of its ``sweep.json``.
        files: of all that is published, relative to it, in order; those that are made here among them.
    """

    path: Path
    sweep: Mapping[str, Any]
    files: tuple[str, ...]

    @property
    def bytes_(self) -> int:
        """Of what is there already."""
        return sum((self.path / f).stat().st_size for f in self.files if (self.path / f).is_file())


class Hub(Protocol):
    """What is asked of the hub; ``huggingface_hub.HfApi`` is one."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository, unless it is there."""

    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
    ) -> Any:
        """Upload the files of a folder that match."""


def opened(path: Path) -> Folder:
    """A finished sweep's folder.

    Raises:
        Refused: there is no sweep, or an output of it is missing or of another size.
    """
    file = path / SWEEP
    if not file.is_file():
        raise Refused(
            f"there is no {SWEEP} in {str(path)!r}",
            fix=f"bitmill sweep MODEL --ladder gguf -o {path}, then publish",
        )
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size < _LARGEST else None
        tiers = [(str(t["file"]), int(t["bytes"])) for t in told["tiers"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(
            f"{SWEEP} is not what a sweep leaves", where=str(file), fix="run the sweep again"
        ) from error
    names: list[str] = []
    for name, bytes_ in tiers:
        if Path(name).name != name or name in ("", ".", ".."):
            raise Refused(f"{name!r} is no name of an output", where=str(file), fix="run the sweep again")
        inside = _inside(path, name)
        if sum((path / f).stat().st_size for f in inside) < bytes_ or not inside:
            raise Refused(f"{name} is not whole", where=str(path), fix="run the sweep again")
        names += [*inside, *([m.name] if (m := result_path(path, name)).is_file() else [])]
    extra = [name for name in (MATRIX, PAGE, SWEEP) if (path / name).is_file()]
    return Folder(path, told, (CARD, SUMS, PLOT, *extra, *names))


def _inside(path: Path, name: str) -> list[str]:
    place = path / name
    if place.is_symlink():
        raise Refused(f"{name} is a link, and links are not published", where=str(path))
    if place.is_file():
        return [name]
    files = sorted(p for p in place.rglob("*") if p.is_file() and not p.is_symlink())
    return [str(p.relative_to(path)) for p in files]


def write(folder: Folder, *, repo: str | None, license_: str | None, force: bool = False) -> None:
    """Write the card, the picture, and the checksums of everything else, in this order.

    Raises:
        Refused: a card is there that was not made here.
    """
    card = folder.path / CARD
    if card.is_file() and _OURS not in card.read_text(encoding="utf-8", errors="replace") and not force:
        raise Refused(f"{str(card)!r} exists", fix="add --force to replace it")
    picture = frontier(folder.sweep["tiers"], folder.sweep["floor"], folder.sweep["budget"])
    _put(folder.path / PLOT, on_paper(picture))
    _put(card, model_card(folder, repo, license_))
    names = [name for name in folder.files if name != SUMS]
    _put(folder.path / SUMS, "".join(f"{sha256_of(folder.path / n)}  {n}\n" for n in names))


def push(folder: Folder, repo: str, hub: Hub, *, private: bool) -> None:
    """Upload the files of a folder, and nothing else that lies in it."""
    check_repo(repo)
    hub.create_repo(repo, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=repo,
        folder_path=str(folder.path),
        allow_patterns=[_literal(name) for name in folder.files],
        commit_message=f"{len(folder.sweep['tiers'])} measured quantizations, made by bitmill",
    )


def check_repo(repo: str) -> None:
    """Refuse what is no repository's name."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise Refused(f"{repo!r} is no repository's name", fix="--repo ORGANISATION/NAME")


def model_card(folder: Folder, repo: str | None, license_: str | None) -> str:
    """The card: what was measured on what, which file to take, and how each was made."""
    told = folder.sweep
    base = str(told["reference"]["name"])
    title = repo.partition("/")[2] if repo else f"{base}, quantized"
    model = str(told["model"])
    hub = _REPO.fullmatch(model) is not None and not Path(model).exists()
    header = [f"base_model: {model}"] * hub + [f"license: {license_}"] * bool(license_)
    kinds = sorted({"gguf" if str(t["file"]).endswith(".gguf") else "safetensors" for t in told["tiers"]})
    header += ["base_model_relation: quantized"] * hub + ["tags:", *(f"- {k}" for k in (*kinds, "bitmill"))]
    floor = f" The noise floor is {told['floor']:.2g}." if told["floor"] else ""
    parts = [
        "---\n" + "\n".join(header) + "\n---",
        _OURS,
        f"# {_plain(title)}",
        f"{len(told['tiers'])} quantizations of {_code(base)}, made and measured by Bitmill "
        f"{told['bitmill']}.",
        f"![size against loss]({PLOT})",
        _table(told["tiers"]),
        f"KLD is the mean KL divergence from the original's next-token distribution over the full "
        f"vocabulary, in nats a token, with its 95 % interval over windows, on {told['tokens']:,} tokens of "
        f"{len(told['corpus']['sources'])} texts.{floor} Same choice is how often both prefer the same "
        "token. What stands on the front, no other file here beats in both size and loss; beyond the knee "
        f"more bytes buy less. [{PAGE}]({PAGE}) has the rest: by kind of text, by tensor, the worst tokens.",
        "## Check",
        f"```\nsha256sum -c {SUMS}\n```",
        "## Make it again",
        "```\n" + "\n".join([f"pip install bitmill=={told['bitmill']}", *_commands(told)]) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _table(tiers: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| file | recipe | size | bits a weight | KLD | same choice | worst kind | |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for tier in tiers:
        standing = tier["standing"]
        where = "**front, knee**" if standing["knee"] else "front" if standing["front"] else ""
        chance = "" if standing["settled"] else ", within chance"
        where = where or f"beaten by {_code(standing['beaten_by'] or '?')}{chance}"
        cells = (
            f"[{_plain(tier['file'])}](<{tier['file']}>)",
            _code(tier["recipe"]),
            size(tier["bytes"]),
            f"{tier['bpw']:.2f}",
            give(tier["kld"]["mean"], half_width(tier["kld"])),
            percent(tier["same_top"], tier["same_top_se"]),
            f"{give(tier['worst_kld'])} {_plain(tier['worst_kind'])}",
            where,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _commands(told: Mapping[str, Any]) -> list[str]:
    whole = [told["command"]] if told.get("command") else []
    return [_line(text) for text in (*whole, *(t["command"] for t in told["tiers"] if t.get("command")))]


def _line(text: str) -> str:
    """Text inside a fence: nothing of it may end the fence."""
    return text.replace("\n", " ").replace("```", "'''")


def _code(text: str) -> str:
    """A code span in a table's cell."""
    return f"`{_line(text).replace('`', chr(39)).replace('|', '/')}`"


def _plain(text: str) -> str:
    """Text without anything that Markdown or HTML would read as its own."""
    return re.sub(r"([\\`*_\[\]<>|#&!])", r"\\\1", text.replace("\n", " "))


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _put(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise Refused(f"cannot write {str(path)!r}: {error.strerror}", fix="check the folder") from error
