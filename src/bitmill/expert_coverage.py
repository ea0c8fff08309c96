"""Experts in a plan and in a report: what calibration cannot do with them, and how many tokens each has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bitmill.core.axes import CalibratedSolver, Checkpoint, Solver
from bitmill.core.errors import Refused
from bitmill.core.experts import ExpertTokens, parse_experts
from bitmill.core.types import Row
from bitmill.families.base import Family, is_expert, traits
from bitmill.recipe import Recipe

_FEW = 0.01  # of the tokens it would have if all experts had as many


def refuse_experts(rows: Sequence[Row], family: Family, solver: Solver) -> None:
    """Experts that calibration cannot reach, or whose tokens would not be the same in two models."""
    expert = next((row for row in rows if row.solved and is_expert(row.name)), None)
    if expert is None:
        return
    if not family.has_single_experts:
        raise Refused(
            f"how transformers runs the experts of {family.model_types[0]!r} is not known here",
            where=expert.name,
            fix="use nearest, hqq or clip without --calib; or --imatrix with data for the experts",
        )
    if isinstance(solver, CalibratedSolver) and solver.cross:
        raise Refused(
            "an expert of the quantized model may see other tokens than the original's: nothing to compare",
            where=expert.name,
            fix="drop asymmetric=, or keep=gate+up+down",
        )


def expert_remarks(
    recipe: Recipe,
    rows: Sequence[Row],
    family: Family,
    solver: Solver,
    source: Checkpoint,
    needs: str,
    tokens: int,
) -> tuple[str, ...]:
    """What a plan says of the tokens that experts will see.

    Args:
        needs: ``nothing``, ``diagonal`` or ``gram``: what calibration takes.
        tokens: of the whole calibration; 0 where moments are known already.

    Raises:
        Refused: calibration cannot reach them; see :func:`refuse_experts`.
    """
    tokens = 0 if needs == "nothing" else tokens
    if tokens:
        refuse_experts(rows, family, solver)
    experts = [row for row in rows if row.solved and is_expert(row.name)]
    if not experts or not tokens:
        why = "no expert is calibrated" if experts else "there are no experts to place"
        asked = recipe.experts
        return () if asked is None else (f"experts={asked} is for nothing: {why}",)
    count, used = traits(source.config)["experts"], _used(source.config)
    each = tokens * used // max(count, 1)
    policy = parse_experts(recipe.experts or "route")
    said = f"experts: {used} of {count} see a token, so that each is sent about {each:,} of {tokens:,}"
    return (f"{said}{_shown(policy, tokens, count)}",)


def _shown(policy: ExpertTokens, tokens: int, count: int) -> str:
    if policy.kind == "all":
        return f"; experts=all shows each all {tokens:,}"
    if policy.kind == "topk":
        return f"; {policy} shows each about {tokens * min(policy.count, count) // max(count, 1):,}"
    if policy.kind == "until":
        return f"; {policy} shows each {min(policy.count, tokens):,} at least"
    return "; experts=until=N shows each N at least"


def _used(config: Mapping[str, Any]) -> int:
    return int(config.get("num_experts_per_tok") or config.get("top_k") or 1)


def coverage(tensors: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a report says of its experts, from the counts beside their errors; nothing without any.

    Experts of a block have one entry each: that of the weight whose name comes first. Where a file of moments
    or importance told what experts have seen, how many tokens each was sent is not known: ``sent`` and what
    follows from it is then left out.
    """
    found: dict[str, dict[int, tuple[int | None, int]]] = {}
    for name, entry in sorted(tensors.items()):
        if "tokens" in entry:
            block, expert = _expert(name)
            sent = int(entry["sent"]) if "sent" in entry else None
            found.setdefault(block, {}).setdefault(expert, (sent, int(entry["tokens"])))
    shown = [tokens for experts in found.values() for _, tokens in experts.values()]
    if not shown:
        return {}
    blocks = [_block(block, dict(sorted(experts.items()))) for block, experts in found.items()]
    blocks.sort(key=lambda block: block["block"])
    told: dict[str, Any] = {"experts": len(shown), "shown_least": min(shown), "blocks": blocks}
    counts = {(b, e): sent for b, experts in found.items() for e, (sent, _) in experts.items()}
    known = sorted(sent for sent in counts.values() if sent is not None)
    if len(known) < len(counts):
        return told
    few = _FEW * sum(known) / len(known)
    return {
        **told,
        "sent": {"least": known[0], "median": median(known), "most": known[-1]},
        "never_sent": sum(count == 0 for count in known),
        "under_a_hundredth_of_the_mean": [
            f"{b}.experts.{e}" for (b, e), sent in counts.items() if sent is not None and sent < few
        ],
    }


def said_of(covered: Mapping[str, Any]) -> str:
    """The line about what :func:`coverage` found."""
    sent, said = covered.get("sent"), f"experts: {covered['experts']}, "
    if sent is not None:
        said += f"sent {sent['least']:,} to {sent['most']:,} tokens each, median {sent['median']:,.0f}; "
        said += f"{covered['never_sent']} none; "
    return f"{said}least shown {covered['shown_least']:,}"


def _block(name: str, experts: Mapping[int, tuple[int | None, int]]) -> dict[str, Any]:
    """Its number, and of each of its experts in order the tokens it was sent (or null) and was shown."""
    number = re.search(r"\d+", name)
    return {
        "block": int(number[0]) if number else 0,
        "experts": list(experts),
        "sent": [sent for sent, _ in experts.values()],
        "shown": [shown for _, shown in experts.values()],
    }


def _expert(name: str) -> tuple[str, int]:
    head, _, rest = name.partition(".experts.")
    return head, int(rest.partition(".")[0])
