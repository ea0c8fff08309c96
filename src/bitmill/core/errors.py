"""The four refusals a user can meet; each says what is wrong, where, why, and what would work."""

from __future__ import annotations


class BitmillError(Exception):
    """Base of every error that is the user's to act on.

    Args:
        what: the problem in one sentence, quoting the offending input.
        where: the file, tensor, block or field it was met in.
        fix: the next step that would work.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f"\n  where: {where}" if where else ""
        remedy = f"\n  try:   {fix}" if fix else ""
        super().__init__(f"{what}{place}{remedy}")


class Refused(BitmillError):
    """The request is understood and cannot be granted; nothing has been written."""


class BadRecipe(Refused):
    """The recipe's text does not parse, or names something that does not exist."""


class BadFile(BitmillError):
    """A file is truncated, inconsistent, or not what it claims to be."""


class Unsolvable(BitmillError):
    """The numbers gave out while solving: non-finite activations, an exploding block."""


class Interrupted(BitmillError):
    """A clean stop (Ctrl-C, full disk): what is done is safe, the same command goes on from there."""
