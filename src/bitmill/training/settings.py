"""What training is told, whatever learns."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.core.errors import Refused
from bitmill.training.optimizers import CHOICES


@dataclass(frozen=True)
class Settings:
    """How something is learned (defaults after Dettmers et al., arXiv 2305.14314, for smaller data).

    Attributes:
        steps: of the optimizer; 0 is one pass over the examples.
        lr: learning rate behind the warm-up.
        batch: examples of a step.
        context: most tokens of an example.
        seed: of what is random at the start, the order of the examples, and which of them judge.
        optimizer: one of :data:`~bitmill.training.optimizers.CHOICES`.
        keep: ``best`` writes the step that the held-out examples like best, ``last`` the last.
        micro_tokens: tokens that go through the model at once, padding included.
        clip: most norm of a gradient.
        falls: whether the learning rate falls to 0 over the steps, or stays.
    """

    steps: int = 0
    lr: float = 2e-4
    batch: int = 16
    context: int = 1024
    seed: int = 0
    optimizer: str = "auto"
    keep: str = "best"
    micro_tokens: int = 2048
    clip: float = 0.3
    falls: bool = False

    def __post_init__(self) -> None:
        for name, bound in {"batch": 1, "context": 8, "steps": 0, "micro_tokens": 8}.items():
            if vars(self)[name] < bound:
                raise Refused(f"{name} {vars(self)[name]} is too small", fix=f"at least {bound}")
        if not 0 < self.lr <= 1000:
            raise Refused(f"a learning rate of {self.lr} teaches nothing", fix="a small number, such as 2e-4")
        if self.optimizer not in CHOICES:
            raise Refused(f"--optimizer {self.optimizer!r}", fix=f"one of: {', '.join(CHOICES)}")
        if self.keep not in ("best", "last"):
            raise Refused(f"--keep {self.keep!r}", fix="best, or last")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: up over the first 3 % of them, then constant or down to 0."""
        up = min(1.0, (step + 1) / max(1, round(0.03 * steps)))
        return self.lr * up * ((1 - step / steps) if self.falls else 1.0)
