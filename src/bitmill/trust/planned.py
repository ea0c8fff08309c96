"""A plan against a runtime, before hours are spent: the very headers it would write, by the same rules."""

from __future__ import annotations

from collections.abc import Sequence

from bitmill.core.errors import Refused
from bitmill.core.types import FileImage
from bitmill.trust.contracts import Target
from bitmill.trust.findings import Finding, gravest_first
from bitmill.trust.layers import layers_of
from bitmill.trust.rules import judge
from bitmill.trust.stored import planned


def judge_plan(files: Sequence[FileImage], to: Target, tp: int = 1) -> tuple[Finding, ...]:
    """What ``to`` would find in an output of these files."""
    model = planned(files)
    layers = layers_of(model)
    return gravest_first((*layers.found, *judge(model, layers, to, tp)))


def refuse_unloadable(files: Sequence[FileImage], to: Target, tp: int = 1) -> tuple[Finding, ...]:
    """Refuse a plan that the runtime cannot load; what is less grave is handed back.

    Raises:
        Refused: with the first error, and how many more there are.
    """
    found = judge_plan(files, to, tp)
    errors = [finding for finding in found if finding.level == "error"]
    if errors:
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Refused(
            f"{to} could not load this: {first.what}{more}", where=first.where or None, fix=first.fix or None
        )
    return found
