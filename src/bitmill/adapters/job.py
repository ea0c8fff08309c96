"""The job that fills a workspace with an adapter: freeze the base, put peft's adapter around it, teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitmill.account import Report
from bitmill.adapters.base import Base, frozen
from bitmill.adapters.files import PREFIX, WEIGHTS_FILE, adapter_tensors
from bitmill.checkpoint.safetensors import read_header
from bitmill.checkpoint.safetensors_write import to_bytes
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Unsolvable
from bitmill.core.types import Row
from bitmill.journal import Workspace
from bitmill.training.course import Course
from bitmill.training.pupil import Pupil

FINISHED = "adapter"


@dataclass(frozen=True)
class AdapterJob:
    """Learns an adapter.

    Attributes:
        source: the model.
        rows: its frozen linears; ``taught`` those that get an adapter of rank ``rank``.
        course: how it is taught.
        config: peft's description.
        plan: facts of the plan, for the report; ``bytes`` and ``digest`` among them.
        device, dtype: of everything that is not frozen.
    """

    source: Checkpoint
    rows: tuple[Row, ...]
    taught: tuple[Row, ...]
    rank: int
    course: Course
    config: Any
    plan: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def space(self) -> Workspace:
        """What it fills."""
        return self.course.space

    def tell(self, event: str, done: int, total: int, text: str) -> None:
        """Say how far it is."""
        self.course.tell(event, done, total, text)

    def run(self, identity: Mapping[str, Any], done: Sequence[Mapping[str, Any]], started: float) -> Report:
        """Learn, or go on learning; the report."""
        return self.course.report(FINISHED, self._learned, self.plan, identity, done, started)

    def verify_sample(self) -> None:
        """Read the header of what was written as any reader would.

        Raises:
            Unsolvable: it does not hold the adapter's tensors.
        """
        written = {r.name: r.shape for r in read_header(self.space.payload / WEIGHTS_FILE).records}
        if written != {name: shape for name, (_, shape) in adapter_tensors(self.taught, self.rank).items()}:
            raise Unsolvable("the adapter that was written does not read back", where=str(self.space.payload))

    def _learned(self, kept: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        base = frozen(self.source, self.rows, self.dtype, self.device, self._prepared)
        named, settings = self._adapted(base), self.course.settings
        pupil = Pupil(base.model, base.body, named, settings.micro_tokens, settings.clip)
        learned = self.course.learn(pupil, kept)
        for name, value in learned.values.items():
            self.space.write(name, to_bytes(value))
        facts = {**learned.facts, "base_bytes": base.held}
        notes = [vars(note) for note in learned.notes]
        self.space.finish_unit(FINISHED, {"tuning": facts, "notes": notes})
        return facts, notes

    def _adapted(self, base: Base) -> dict[str, nn.Parameter]:
        """Put peft's adapter around the base; what learns, by the names in the file."""
        from peft import get_peft_model

        base.model.name_or_path = self.config.base_model_name_or_path
        with torch.random.fork_rng():
            torch.manual_seed(self.course.settings.seed)
            wrapped = get_peft_model(base.model, self.config)
        named = {n.replace(".default.", "."): p for n, p in wrapped.named_parameters() if p.requires_grad}
        wanted = {name: shape for name, (_, shape) in adapter_tensors(self.taught, self.rank).items()}
        if {name: tuple(p.shape) for name, p in named.items()} != wanted:
            odd = sorted(wanted.keys() ^ named.keys())
            raise Unsolvable(
                "peft puts the adapter elsewhere than planned",
                where=odd[0].removeprefix(PREFIX) if odd else None,
                fix="another version of peft; and report it",
            )
        return named

    def _prepared(self, done: int, blocks: int) -> None:
        self.tell("freeze", done, blocks, "")
