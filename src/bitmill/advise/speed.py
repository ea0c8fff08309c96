"""Tokens a second of a file: measured as llama-bench does, or as the model of the cliff has it.

``pp``: a prompt of random tokens goes in at once. ``tg``: tokens go in one at a time, from an empty cache on.
A GGUF file runs in llama.cpp where llama-cpp-python is installed; anything else, decoded to float32, in
transformers, which says nothing about the speed of a runtime with kernels for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from bitmill.advise.cache_types import cache_types
from bitmill.advise.cliff import Range, cliff
from bitmill.advise.detect import processor
from bitmill.advise.machine import Machine
from bitmill.advise.memory import Model, Wanted
from bitmill.advise.models import as_it_is
from bitmill.core.errors import Refused
from bitmill.numerics.student import student
from bitmill.run.load import load

MEASURED, MODELLED = "measured here", "modelled"
OURS = "transformers, decoded to float32"
_LLAMA = "llama_cpp"
_LEAST = 1e-9  # seconds


@dataclass(frozen=True)
class Rate:
    """Tokens a second over repeats, or the ends of a model's range.

    Attributes:
        tokens: how many at a time (a prompt), or one after the other.
        mean: over the repeats; the middle of a range.
        ci95: a mean's 95 % interval; the two ends of a range; None after one repeat.
        repeats: each repeat's own; empty when modelled.
    """

    tokens: int
    mean: float
    ci95: Range | None
    repeats: tuple[float, ...] = ()

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Rate:
        """From the time that each repeat took."""
        rates = tuple(tokens / max(s, _LEAST) for s in seconds)
        mean = fmean(rates)
        if len(rates) == 1:
            return cls(tokens, mean, None, rates)
        half = student(len(rates) - 1) * stdev(rates) / len(rates) ** 0.5
        return cls(tokens, mean, (max(mean - half, 0.0), mean + half), rates)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        ends = None if self.ci95 is None else list(self.ci95)
        return {**vars(self), "ci95": ends, "repeats": list(self.repeats)}


@dataclass(frozen=True)
class Speed:
    """How fast a file runs.

    Attributes:
        runtime: the program.
        evidence: ``measured here`` or ``modelled``.
        prefill, decode: of a prompt, and of tokens one by one; None where not known or not asked for.
    """

    runtime: str
    evidence: str
    prefill: Rate | None
    decode: Rate | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        prefill, decode = (None if r is None else r.to_json() for r in (self.prefill, self.decode))
        return {"runtime": self.runtime, "evidence": self.evidence, "prefill": prefill, "decode": decode}


def runtime_here(path: Path) -> str:
    """The program that would run the file for a measurement: llama.cpp, or :data:`OURS`."""
    return "llama.cpp" if path.suffix == ".gguf" and find_spec(_LLAMA) is not None else OURS


def modelled(path: Path, machine: Machine, prompt: int, generated: int) -> Speed:
    """What the model of the cliff says of this file on that machine.

    Raises:
        Refused: what the architecture keeps is not known.
        BadFile: the file is not what it claims to be.
    """
    model = as_it_is(path, None, bool(machine.cards))
    decode = _cliff(model, machine, max(generated, 1))
    prefill = _cliff(model, machine, max(prompt, 1))
    return Speed(
        model.runtime.name,
        MODELLED,
        Rate(prompt, _middle(prefill[1]), prefill[1]) if prompt and prefill[1] is not None else None,
        Rate(generated, _middle(decode[0]), decode[0]) if generated else None,
    )


def _cliff(model: Model, machine: Machine, context: int) -> tuple[Range, Range | None]:
    """Tokens a second one by one, and of a prompt of ``context`` tokens."""
    wanted = Wanted(context, 1, cache_types(model.runtime.types[0]))
    found = cliff(model, wanted, machine)
    split = found.best or found.splits[-1]
    low, high = sorted(split.decode)
    if split.prefill is None:
        return (low, high), None
    slow, quick = sorted(split.prefill, reverse=True)
    return (low, high), (context / max(slow, _LEAST), context / max(quick, _LEAST))


def _middle(ends: Range) -> float:
    return sum(ends) / len(ends)


def measured(
    path: Path,
    *,
    prompt: int = 512,
    generated: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> Speed:
    """Run the file: one repeat to warm up, then ``repeats`` that count.

    Args:
        prompt, generated: tokens; 0 leaves that out.
        threads: of llama.cpp; None is the cores this process may use.
        tell: called with repeats done and in all.

    Raises:
        Refused: nothing is asked for, or it cannot be run here.
    """
    if prompt < 0 or generated < 0 or not prompt + generated or repeats < 1:
        raise Refused("there is nothing to time", fix="-p 512 -n 128, and at least one repeat")
    program = runtime_here(path)
    made = _llama if program == "llama.cpp" else _own
    engine = made(path, prompt + generated + 1, threads or processor().cores)
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(repeats + 1):
        tell(turn, repeats + 1)
        for kind, tokens in (("prefill", prompt), ("decode", generated)):
            if tokens:
                took = engine(tokens, kind == "decode")
                seconds[kind] += [took] if turn else []
    tell(repeats + 1, repeats + 1)
    return Speed(
        program,
        MEASURED,
        Rate.of(prompt, seconds["prefill"]) if prompt else None,
        Rate.of(generated, seconds["decode"]) if generated else None,
    )


Engine = Callable[[int, bool], float]
"""Seconds that so many tokens take: one after the other, or at once."""


def _llama(path: Path, context: int, threads: int) -> Engine:
    import llama_cpp

    try:
        model = llama_cpp.Llama(
            model_path=str(path), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads,
            n_gpu_layers=-1, verbose=False,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise Refused(f"llama.cpp does not load it: {error}", where=str(path)) from error
    ids = _ids(model.n_vocab(), context)

    def timed(tokens: int, one_by_one: bool) -> float:
        model.reset()
        start = time.perf_counter()
        for at in range(0, tokens, 1 if one_by_one else tokens):
            model.eval(ids[at : at + (1 if one_by_one else tokens)])
        return time.perf_counter() - start

    return timed


def _own(path: Path, context: int, threads: int) -> Engine:
    model, _ = load(path)
    ids = torch.tensor([_ids(int(model.config.vocab_size), context)])

    def step(part: Tensor, cache: Any) -> Any:
        with torch.inference_mode():
            found = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.past_key_values

    def timed(tokens: int, one_by_one: bool) -> float:
        cache, start = None, time.perf_counter()
        for at in range(0, tokens, 1 if one_by_one else tokens):
            cache = step(ids[:, at : at + (1 if one_by_one else tokens)], cache)
        return time.perf_counter() - start

    return timed


def _ids(vocabulary: int, count: int) -> list[int]:
    """Random tokens, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


def ratios(predicted: Speed, found: Speed) -> dict[str, float]:
    """Predicted over measured, of what both know."""
    pairs = {"prefill": (predicted.prefill, found.prefill), "decode": (predicted.decode, found.decode)}
    return {k: a.mean / b.mean for k, (a, b) in pairs.items() if a is not None and b is not None and b.mean}
