"""One call over everything that can be checked of a model file before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.checkpoint.hf_folder import PICKLED, read_carried
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, BitmillError, Refused
from bitmill.source import locate, open_path, open_source
from bitmill.trust.architecture import of_checkpoint, of_gguf
from bitmill.trust.contracts import Target, target
from bitmill.trust.findings import Finding, gravest_first, of_error
from bitmill.trust.layers import layers_of
from bitmill.trust.lying import look_around
from bitmill.trust.rules import judge
from bitmill.trust.stored import Stored, model_file, stored
from bitmill.trust.sums import Tell, compare, manifest_of
from bitmill.trust.talking import look_at_templates, look_at_tokenizer
from bitmill.trust.values import look_through


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        where: the file or folder that was looked at.
        method: how its weights are stored; None where it could not be told.
        tensors, bytes_: of it.
        to: runtimes that it was held against, each with its version.
        tp: among how many cards.
        checked: names of the checks that were done, in their order.
        found: findings, the gravest first.
    """

    where: Path
    method: str | None
    tensors: int
    bytes_: int
    to: tuple[Target, ...]
    tp: int
    checked: tuple[str, ...]
    found: tuple[Finding, ...]

    @property
    def path(self) -> str:
        """Its path as text."""
        return str(self.where)

    def count(self, level: str) -> int:
        """How many findings have this level."""
        return sum(finding.level == level for finding in self.found)

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.count("error")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "path": self.path,
            "good": self.good,
            "method": self.method,
            "tensors": self.tensors,
            "bytes": self.bytes_,
            "for": [
                {"runtime": t.contract.name, "version": t.said, "date": t.contract.date} for t in self.to
            ],
            "tp": self.tp,
            "checked": list(self.checked),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "findings": [finding.to_json() for finding in self.found],
        }


def verify(
    model: str,
    *,
    to: tuple[str, ...] = (),
    tp: int = 1,
    base: str | None = None,
    values: bool = False,
    revision: str | None = None,
    tell: Tell | None = None,
) -> Verdict:
    """Look a model file or folder through; its weights are read only where ``values`` or a manifest ask.

    Args:
        model: anything :func:`~bitmill.source.open_source` takes.
        to: runtimes that shall load it, ``vllm`` or ``vllm@0.11``.
        tp: among how many cards that runtime parts its layers.
        base: the model it was made of, whose tokenizer it must have.
        values: look for NaN and infinities in every tensor.
        tell: called with an event, how much of it is done, of how much, and a name.

    Raises:
        Refused: there is nothing to look at, or no such runtime.
    """
    targets = tuple(target(text) for text in to)
    if tp < 1:
        raise Refused(f"a model is parted among 1 card or more, not {tp}")
    path = model_file(locate(model, revision=revision))
    original = None if base is None else open_source(base)
    return _Look(path, targets, tp, original, values, tell or _nothing).verdict()


def _nothing(event: str, done: int, total: int, text: str) -> None:
    """Tells nobody."""


class _Look:
    """One look at one path: each check adds what it finds; a check that cannot be done says so."""

    def __init__(
        self, path: Path, to: tuple[Target, ...], tp: int, base: Checkpoint | None, values: bool, tell: Tell
    ) -> None:
        self.path, self.to, self.tp, self.base, self.values, self.tell = path, to, tp, base, values, tell
        self.found: list[Finding] = []
        self.checked: list[str] = []

    def verdict(self) -> Verdict:
        """Everything, from what costs least."""
        model = self._stored()
        if self.path.is_dir():
            self._check("files", look_around(self.path))
        self._sums()
        if model is not None:
            self._look_into(model)
        return Verdict(
            where=self.path,
            method=None if model is None else model.method,
            tensors=0 if model is None else len(model.parts),
            bytes_=0 if model is None else model.bytes_,
            to=self.to,
            tp=self.tp,
            checked=tuple(dict.fromkeys(self.checked)),
            found=gravest_first(self.found),
        )

    def _check(self, name: str, found: tuple[Finding, ...] | Iterator[Finding]) -> None:
        self.checked.append(name)
        self.found += found

    def _stored(self) -> Stored | None:
        self.checked.append("structure")
        if self.path.suffix.lower() in PICKLED:
            what = "it is pickled: loading it can run any code it contains; nothing in it was looked at"
            fix = "a version of the model in safetensors or GGUF"
            self.found.append(Finding("error", "files", what, str(self.path), fix))
            return None
        try:
            return stored(self.path)
        except BitmillError as error:
            self.found.append(of_error(error, "structure"))
            return None

    def _sums(self) -> None:
        if not manifest_of(self.path).is_file():
            return
        try:
            self._check("manifest", compare(self.path, self.tell))
        except BadFile as error:
            self.found.append(of_error(error, "manifest"))

    def _look_into(self, model: Stored) -> None:
        layers = layers_of(model)
        self._check("layout", layers.found)
        opened = self._opened()
        carried = self._carried(opened)
        if model.gguf:
            self._check("architecture", of_gguf(model))
        elif opened is not None:
            self._check("architecture", of_checkpoint(opened))
        self._check("template", look_at_templates(model, carried))
        if opened is not None:
            self._check("tokenizer", look_at_tokenizer(opened, self.base))
        for to in self.to:
            self._check(f"for {to}", judge(model, layers, to, self.tp))
        if self.values:
            self._check("values", look_through(self.path, model.gguf, self.tell))

    def _opened(self) -> Checkpoint | None:
        """The model as all of Bitmill opens it; what that refuses to read may be sound nevertheless."""
        try:
            return open_path(self.path)
        except BadFile as error:
            self.found.append(of_error(error, "layout"))
        except Refused as error:
            what = f"what follows from reading it was not checked: {error.what}"
            self.found.append(Finding("warning", "layout", what, error.where or "", error.fix or ""))
        return None

    def _carried(self, opened: Checkpoint | None) -> Mapping[str, bytes]:
        try:
            if opened is not None:
                return opened.carried
            return read_carried(self.path) if self.path.is_dir() else {}
        except BitmillError as error:
            self.found.append(of_error(error, "tokenizer"))
            return {}
