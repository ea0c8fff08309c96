"""A plan against a runtime, before hours are spent: the very headers it would write, by the same rules."""

from __future__ import annotations

from collections.abc import Sequence

from bitmill.core.errors import Refused
from bitmill.core.types import FileImage
from bitmill.trust.contracts import Target, contracts, target
from bitmill.trust.findings import Finding, gravest_first
from bitmill.trust.layers import Layers, layers_of
from bitmill.trust.rules import judge
from bitmill.trust.stored import Stored, planned

_OURS = "bitmill"


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


def loader_remarks(files: Sequence[FileImage], strict: bool = False) -> tuple[str, ...]:
    """What a plan says of programs that are made for such files and would not load these, or would load them
    as other numbers: by the newest version that is known of each.

    Raises:
        Refused: the plan is to be strict, and one loads other numbers without a word, or none is known to
            load it.
    """
    model = planned(files)
    layers = layers_of(model)
    found = [(to, _wrong(model, layers, to)) for to in _made_for(model.method)]
    able = [str(to) for to, wrong in found if not wrong]
    grave = [(to, f) for to, wrong in found for f in wrong if f.doubt == "silent" or not able]
    if strict and grave:
        to, first = grave[0]
        raise Refused(f"--strict: {to}: {first.what}", where=first.where or None, fix=first.fix or None)
    if not found:
        return _former(model)
    if not able:
        reasons = "; ".join(f"{to}: {wrong[0].what}" for to, wrong in found)
        return (f"no loader is known to take this: {reasons}; --strict refuses this",)
    return tuple(_sentence(to, wrong, able) for to, wrong in found if wrong)


def _made_for(method: str) -> list[Target]:
    """Other people's programs that load files of a method without being asked twice."""
    known = [target(name) for name in contracts() if name != _OURS]
    takes = [to.contract.method(method, to.version) for to in known]
    return [to for to, how in zip(known, takes, strict=True) if how is not None and how.level == "note"]


def _wrong(model: Stored, layers: Layers, to: Target) -> list[Finding]:
    found = judge(model, layers, to)
    return [f for f in gravest_first(found) if f.level == "error" or f.doubt]


def _sentence(to: Target, wrong: Sequence[Finding], able: Sequence[str]) -> str:
    others = f"nothing is known against it in {' and '.join(able)}"
    silent = next((finding for finding in wrong if finding.doubt == "silent"), None)
    if silent is not None:
        return f"{to} loads other numbers: {silent.what}; {others}; --strict refuses this"
    how = "was not seen to load this" if wrong[0].doubt == "unseen" else "does not load this"
    return f"{to} {how}: {wrong[0].what}; {others}"


def _former(model: Stored) -> tuple[str, ...]:
    """What is to be said where only older versions load such files."""
    gone = [
        (contract.title, former.span.until)
        for name, contract in contracts().items()
        if name != _OURS and (former := contract.former(model.method)) is not None
        and contract.method(model.method, target(name).version) is None
    ]  # fmt: skip
    if not gone:
        return ()
    listed = " and ".join(f"{title} before {'.'.join(map(str, until))}" for title, until in gone)
    return (f"the newest versions of its loaders do not take such files; {listed} did",)
