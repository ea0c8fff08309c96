"""A model some of whose parameters learn: losses of lessons, with gradients, in micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bitmill.calibrate.skeleton import scaled_logits
from bitmill.numerics.portions import Portions
from bitmill.training.lessons import Lesson

LOGITS = 256  # positions whose logits are alive at once


@final
class Pupil:
    """Computes block by block, once more on the way back (gradient checkpointing), and logits in parts.

    Args:
        model: transformers' own.
        body: path of the part of it that ends before the head.
        named: what learns, by the name it is kept under.
        micro_tokens: tokens that go through the model at once, padding included.
        clip: most norm of a gradient.

    Attributes:
        parameters: what learns.
        portions: tokens that go through the model at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        body: str,
        named: Mapping[str, nn.Parameter],
        micro_tokens: int,
        clip: float,
    ) -> None:
        self._model, self._body, self._named = model, model.get_submodule(body), dict(named)
        self.portions, self._clip = Portions(micro_tokens, "tokens"), clip
        self._facts = model.config.to_dict()
        self.parameters = list(self._named.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 6 calls it otherwise
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def now(self) -> dict[str, Tensor]:
        """What has been learned, float32."""
        return {name: p.detach().to("cpu", torch.float32).clone() for name, p in self._named.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`now`."""
        for name, parameter in self._named.items():
            parameter.copy_(values[name])

    def lesson(self, batch: Sequence[Lesson], seed: int) -> tuple[float, float]:
        """Mean loss of a batch, nats an answer token, with gradients left in place, clipped; their norm."""
        self._model.train()
        total = self.portions.through(partial(self._taught, batch, seed), *_sizes(batch))
        return total, float(nn.utils.clip_grad_norm_(self.parameters, self._clip))

    @torch.no_grad()
    def judged(self, lessons: Sequence[Lesson]) -> float:
        """Mean loss, nats an answer token."""
        self._model.eval()

        def summed(size: int) -> float:
            return sum(float(self._loss(ids, counts)) for ids, counts in _micro(lessons, size))

        return self.portions.through(summed, *_sizes(lessons)) / sum(lesson.answers for lesson in lessons)

    def _taught(self, batch: Sequence[Lesson], seed: int, size: int) -> float:
        """The loss, with gradients left in place."""
        answers, total = sum(lesson.answers for lesson in batch), 0.0
        for parameter in self.parameters:
            parameter.grad = None
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)  # dropout of the model's own
            for ids, counts in _micro(batch, size):
                loss = self._loss(ids, counts) / answers
                loss.backward()
                total += float(loss.detach())
        return total

    def _loss(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Sum over the tokens that count. Padding stands behind, where no earlier token sees it."""
        device = self.parameters[0].device
        hidden = self._body(input_ids=ids.to(device), use_cache=False).last_hidden_state[:, :-1]
        mark = counts[:, 1:].to(device)
        said, wanted = hidden[mark], ids[:, 1:].to(device)[mark]
        parts = [
            checkpoint(self._nats, h, w, use_reentrant=False)
            for h, w in zip(said.split(LOGITS), wanted.split(LOGITS), strict=True)
        ]
        return torch.stack(parts).sum()

    def _nats(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        logits = self._model.get_output_embeddings()(hidden).float()
        return nn.functional.cross_entropy(scaled_logits(logits, self._facts), wanted, reduction="sum")


def _sizes(lessons: Sequence[Lesson]) -> tuple[int, int]:
    """Tokens of all, padding included, and the least that go through at once: the longest lesson."""
    longest = max(len(lesson.ids) for lesson in lessons)
    return longest * len(lessons), longest


def _micro(lessons: Sequence[Lesson], most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Lessons of like length together, padded behind, at most so many tokens at once but one at least."""
    ordered = sorted(lessons, key=lambda lesson: -len(lesson.ids))
    at = 0
    while at < len(ordered):
        width = len(ordered[at].ids)
        part = ordered[at : at + max(1, most // width)]
        at += len(part)
        yield (
            nn.utils.rnn.pad_sequence([lesson.ids for lesson in part], batch_first=True),
            nn.utils.rnn.pad_sequence([lesson.counts for lesson in part], batch_first=True),
        )
