"""One call from a model and a file of examples to an adapter (QLoRA, Dettmers et al., arXiv 2305.14314)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitmill.account import Report
from bitmill.adapters.base import base_rows, experts_of_rows, taught_rows
from bitmill.adapters.files import adapter_images, lora_config, targets
from bitmill.adapters.job import AdapterJob
from bitmill.checkpoint.tokenizer import load_tokenizer
from bitmill.core.axes import Checkpoint, total_bytes
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Row
from bitmill.forecast import BASE_BYTES, refuse_folder
from bitmill.journal import Boundary, Workspace
from bitmill.mill import carry_out
from bitmill.source import open_source
from bitmill.training.course import Course
from bitmill.training.lessons import Lessons, read_lessons
from bitmill.training.settings import Settings
from bitmill.walk import Progress

STATE_BYTES = 16  # of a learned weight: itself, its gradient and two means


@dataclass(frozen=True, eq=False)
class AdapterPlan:
    """What learning an adapter would do, from headers and the examples alone.

    Attributes:
        rows: the frozen linears; ``taught`` those that get an adapter.
        config: peft's description of the adapter.
        steps: of the optimizer.
        dtype: of everything that is not frozen, and of products.
    """

    source: Checkpoint
    rows: tuple[Row, ...]
    taught: tuple[Row, ...]
    lessons: Lessons
    settings: Settings
    rank: int
    steps: int
    config: Any
    files: tuple[FileImage, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def learned(self) -> int:
        """Weights that learn."""
        return sum(self.rank * sum(row.shape) for row in self.taught)

    @property
    def base_bytes(self) -> int:
        """Bytes of the frozen linears, as their grids count them; of those stored quantized already, from
        the size of the whole file."""
        rounded = [row for row in self.rows if row.solved]
        held = sum(row.grid.storage_bits((row.shape[0], row.shape[1])) for row in rounded) // 8
        if len(rounded) == len(self.rows):
            return held
        path = self.source.path
        files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix == ".safetensors"]
        return held + sum(file.stat().st_size for file in files)

    @property
    def peak_bytes(self) -> int:
        """Modelled peak: base, adapter with its optimizer, what is dense, activations and logits."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        named = {row.name for row in self.rows}
        facts = self.source.tensors.values()
        dense = sum(math.prod(fact.shape) for fact in facts if fact.name not in named) * size
        largest = max(math.prod(row.shape) for row in self.rows)
        config = self.source.config
        width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        tokens = max(self.settings.micro_tokens, self.settings.context)
        middle = int(config.get("intermediate_size") or 4 * width)
        activations = tokens * (width * layers * size + (12 * width + 6 * middle) * 4)
        logits = 256 * int(config.get("vocab_size", 0)) * 12
        return (
            BASE_BYTES
            + self.base_bytes
            + STATE_BYTES * self.learned
            + dense
            + 12 * largest
            + activations
            + logits
        )

    def identity(self) -> dict[str, Any]:
        """The fields a resumed run must agree on."""
        return {
            "finetune": {**vars(self.settings), "steps": self.steps, "rank": self.rank},
            "source": self.source.digest,
            "data": self.lessons.facts["sha256"],
            "held_out": self.lessons.facts.get("held_out_sha256"),
            "base": _grids(self.rows),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "bitmill": version("bitmill"),
            "files": [[f.path, f.bytes_, hashlib.sha256(f.head).hexdigest()] for f in self.files],
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "digest": hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest(),
            "bytes": total_bytes(self.files),
            "model": str(self.source.path),
            "base": _grids(self.rows),
            "base_bytes": self.base_bytes,
            "learned_weights": self.learned,
            "adapted": len(self.taught),
            "targets": sorted(self.config.target_modules),
            "steps": self.steps,
            "rank": self.rank,
            "alpha": self.config.lora_alpha,
            "settings": vars(self.settings),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "peak_bytes": {"value": self.peak_bytes, "evidence": "modelled"},
            "files": [{"path": f.path, "bytes": f.bytes_} for f in self.files],
        }

    @property
    def headline(self) -> tuple[str, ...]:
        """What matters first."""
        facts, grids = self.lessons.facts, ", ".join(f"{n} x {grid}" for grid, n in _grids(self.rows).items())
        passes = self.steps * self.settings.batch / max(facts["examples"], 1)
        return (
            f"base: {grids}, frozen: about {self.base_bytes / 1e6:,.1f} MB",
            f"adapter: rank {self.rank} on {len(self.taught)} linears, {self.learned:,} weights, "
            f"{total_bytes(self.files):,} bytes",
            f"data: {facts['examples']} examples teach ({facts['answer_tokens']:,} tokens count), "
            f"{facts['held_out']} judge",
            f"{self.steps} steps of {self.settings.batch} examples, {passes:.1f} passes; about "
            f"{self.peak_bytes / 2**30:.1f} GiB of memory (modelled)",
        )


def plan_adapter(
    source: Checkpoint,
    data: Path,
    settings: Settings,
    *,
    name: str,
    rank: int = 16,
    alpha: float = 32,
    base_grid: str | None = None,
    held_out: Path | None = None,
    device: str = "cpu",
    out: Path | None = None,
) -> AdapterPlan:
    """What :func:`finetune` would do; reads headers and the examples.

    Args:
        name: what the adapter says its base is called.

    Raises:
        Refused: with what, where, why, and what would work.
    """
    rows = base_rows(source, base_grid)
    taught = taught_rows(rows)
    if not taught:
        raise Refused("every linear of this model is an expert's", where=str(source.path))
    config = lora_config(rank, alpha, targets(taught, experts_of_rows(rows)), name)
    place = _device(device)
    lessons = read_lessons(data, load_tokenizer(source), settings.context, settings.seed, held_out)
    steps = settings.steps or math.ceil(len(lessons.taught) / settings.batch)
    facts = {"source": source.digest, "base": ", ".join(_grids(rows)), "version": version("bitmill")}
    files = adapter_images(taught, rank, config, facts)
    half = place.type == "cuda" and torch.cuda.is_bf16_supported()
    if out is not None:
        refuse_folder(out, total_bytes(files))
    dtype = torch.bfloat16 if half else torch.float32
    return AdapterPlan(source, rows, taught, lessons, settings, rank, steps, config, files, dtype, place)


def finetune(
    model: str | Checkpoint,
    data: str | Path,
    out: str | Path,
    *,
    settings: Settings | None = None,
    rank: int = 16,
    alpha: float = 32,
    base_grid: str | None = None,
    held_out: str | Path | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
    boundary: Boundary = lambda _: None,
) -> Report:
    """Learn an adapter for ``model`` on the examples in ``data``, and write it as peft does.

    Args:
        model: a folder, a ``.gguf`` file, a hub id, ``smollm2``, or an open checkpoint.
        data, held_out: files that :func:`~bitmill.training.lessons.read_lessons` takes.
        out: a folder that does not exist yet (or ``force``).
        rank, alpha: of the adapter; its product counts ``alpha / rank``.
        base_grid: what the base is frozen on; None is ``nf4-b64-dq``, or what a quantized model has stored.
        resume: go on from an interrupted run of the same command.
        progress: called as ``progress(event, done, total, text)``.
        boundary: called at every durable step (tests).

    Raises:
        Refused: something the user can change; nothing was written.
        Interrupted: a clean stop; the same command goes on.
        Unsolvable: learning diverged before anything was learned.
    """
    started = time.monotonic()
    source = open_source(model, revision=revision) if isinstance(model, str) else model
    name = model if isinstance(model, str) else str(model.path)
    aside = None if held_out is None else Path(held_out)
    told = settings or Settings()
    out = Path(out)
    asked: dict[str, Any] = {"rank": rank, "alpha": alpha, "base_grid": base_grid, "held_out": aside}
    made = plan_adapter(source, Path(data), told, name=name, **asked, device=device, out=out)
    return carry_out_plan(made, out, started, force, resume, progress, boundary)


def carry_out_plan(
    made: AdapterPlan,
    out: Path,
    started: float,
    force: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    boundary: Boundary = lambda _: None,
) -> Report:
    """Learn as planned; see :func:`finetune`."""
    space = Workspace(out, made.files, False, boundary)
    course = Course(made.lessons, made.settings, made.steps, space, progress or (lambda *_: None), "finetune")
    job = AdapterJob(
        made.source,
        made.rows,
        made.taught,
        made.rank,
        course,
        made.config,
        made.to_json(),
        made.device,
        made.dtype,
    )
    return carry_out(job, made.identity(), started, force=force, resume=resume)


def _grids(rows: tuple[Row, ...]) -> dict[str, int]:
    return dict(Counter(str(row.grid) if row.solved else f"{row.why} as stored" for row in rows))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Refused(f"--device {name!r}", fix="cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused("there is no GPU that this torch can use", fix="--device cpu")
    return device
