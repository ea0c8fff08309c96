"""What a model's memory depends on beside its weights, read from a GGUF file's keys or from config.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """What one block keeps from token to token.

    Attributes:
        keys, values: numbers a token; an MLA block keeps its latent as keys, and no values.
        head, value_head: numbers that one head has of them: blocks of a cache type must divide it.
        window: how many tokens back it looks; None is all of them.
        states: numbers a sequence, however long it is: one entry a tensor, in float32.
    """

    keys: int = 0
    values: int = 0
    head: int = 0
    value_head: int = 0
    window: int | None = None
    states: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shape:
    """A model as memory sees it.

    Attributes:
        name: architecture or model type.
        blocks: what each keeps.
        hidden: width between blocks.
        middle: numbers a token inside the widest MLP, of all experts that see it.
        queries: numbers a token of all query heads together.
        vocabulary: logits a token.
        trained: the context it was trained for; 0 when nothing says.
        experts, used: experts of a block, and how many of them see a token; 0 without any.
    """

    name: str
    blocks: tuple[Kept, ...]
    hidden: int
    middle: int
    queries: int
    vocabulary: int
    trained: int = 0
    experts: int = 0
    used: int = 0

    @property
    def numbers(self) -> int:
        """Weights of the blocks that one token is multiplied with, by the widths: about a tenth off."""
        inside = sum(2 * self.queries + block.keys + block.values for block in self.blocks)
        return self.hidden * (inside + 3 * self.middle * len(self.blocks))

    @property
    def token_numbers(self) -> int:
        """Keys and values that one more token adds while every window still holds it."""
        return sum(block.keys + block.values for block in self.blocks)
