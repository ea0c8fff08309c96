"""The answer: what to make of which model for a machine, a context and a job, why, and what came second.

Options are judged in the order of the rules, the largest model first. What has nothing against it wins; what
does not fit, is too slow, or has too few bits to be trusted says so. Where nothing is without fault the
answer is the least bad, with its fault; where nothing runs at all, the context at which something would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitmill.advise import rules
from bitmill.advise.inventory import Bare
from bitmill.advise.options import Asked, Judge, Option
from bitmill.advise.quality import HERE
from bitmill.core.errors import Refused


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        asked: the question.
        chosen: the answer; None when nothing runs.
        why: its reasons, the rules' words with their sources.
        caution: what is wrong with it all the same.
        runner_up: what came second; None without any.
        lost: why it is second.
        tried: everything that was considered.
        shorter: what would run with a shorter context, ``(option, context)``, when nothing runs as asked.
    """

    asked: Asked
    chosen: Option | None
    why: tuple[str, ...]
    caution: tuple[str, ...]
    runner_up: Option | None
    lost: str
    tried: tuple[Option, ...]
    shorter: tuple[tuple[Option, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        asked, second = self.asked, self.runner_up
        return {
            "job": asked.job.name,
            "runtime": asked.runtime.name,
            "context": asked.context,
            "parallel": asked.parallel,
            "machine": asked.machine.to_json(),
            "answer": None if self.chosen is None else self.chosen.to_json(),
            "why": list(self.why),
            "caution": list(self.caution),
            "runner_up": None if second is None else {**second.to_json(), "lost": self.lost},
            "shorter": [{**option.to_json(), "context": context} for option, context in self.shorter],
            "tried": [option.to_json() for option in self.tried],
            "rules": dict(rules.cited()),
        }


def advise(models: Sequence[tuple[str, Bare]], asked: Asked) -> Advice:
    """Choose among models, given by name, their recipes and caches.

    Raises:
        Refused: no model is given, or the program is not for the job.
    """
    if not models:
        raise Refused("there is no model to choose", fix="name one, or the same in several sizes")
    steps = rules.ladder(asked.runtime.name, asked.job)
    judges = [Judge(name, bare, asked, steps.try_) for name, bare in models]
    judges.sort(key=lambda judge: -judge.bare.parameters)
    tried = [option for judge in judges for option in judge.options(steps.try_, last=False)]
    last = [option for judge in judges for option in judge.options(steps.last, last=True)]
    good = sorted((o for o in (*tried, *last) if not o.against), key=_spilled)
    if good:
        chosen, note = _measured_first(good)
        why = _reasons(chosen, asked, judges, steps.source)
        second, lost = _second(chosen, good, tried)
        return Advice(asked, chosen, (*why, *note), (), second, lost, (*tried, *last))
    least = _least_bad(tried, last, asked)
    if least is not None:
        second, lost = _second(least, [], [o for o in (*tried, *last) if _runs(o)])
        why = _reasons(least, asked, judges, steps.source)
        return Advice(asked, least, why, _cautions(least, judges), second, lost, (*tried, *last))
    return Advice(asked, None, (), (), None, "", (*tried, *last), _shorter(judges, steps.try_))


def _spilled(option: Option) -> bool:
    """Whether blocks of it are beside the card: experts alone may be."""
    return not option.whole and not (option.split is not None and option.split.experts_off)


def _runs(option: Option) -> bool:
    return (option.split is not None or option.whole) and not any("FP4 only" in a for a in option.against)


def _measured_first(good: Sequence[Option]) -> tuple[Option, tuple[str, ...]]:
    """The first, unless a smaller file of the same model was measured to lose no more."""
    first = good[0]
    if first.loss.evidence != HERE:
        return first, ()
    rivals = [o for o in good if o.model == first.model and o.loss.evidence == HERE and o.kv == first.kv]
    better = min(rivals, key=lambda o: (o.loss.kld, o.bpw))
    if better is first or better.bpw >= first.bpw:
        return first, ()
    said = f"the rules put {first.recipe} first; measured here, {better.recipe} loses no more and is smaller"
    return better, (said,)


def _least_bad(tried: Sequence[Option], last: Sequence[Option], asked: Asked) -> Option | None:
    """What to do where everything has a fault: slow above the floor, or quick below it."""
    slow = max((o for o in tried if _runs(o) and len(o.against) == 1), key=_pace, default=None)
    low = next((o for o in last if _runs(o) and o.whole and o.rate >= asked.job.rate), None)
    if slow is not None and (low is None or slow.rate >= asked.job.rate / 2):
        return slow
    return low or slow or max((o for o in (*tried, *last) if _runs(o)), key=_pace, default=None)


def _pace(option: Option) -> tuple[bool, float]:
    return option.whole, option.rate


def _cautions(option: Option, judges: Sequence[Judge]) -> tuple[str, ...]:
    found = list(option.against)
    if option.last and len(judges) == 1:
        found.append(
            "a smaller model at 4 bits or more is the better choice wherever there is one: name it as well, "
            "and both are weighed (flow, steps 5 and 6)"
        )
    if option.bits < rules.low_bits()[0]:
        found.append(rules.low_bits()[1])
    if option.last:
        found.append("measure it before trusting it: bitmill measure FILE --against MODEL")
    return tuple(found)


def _reasons(option: Option, asked: Asked, judges: Sequence[Judge], source: str) -> tuple[str, ...]:
    judge = next(j for j in judges if j.name == option.model)
    found = [f"{asked.job.name}: {asked.job.why} ({asked.job.source})"]
    larger = [j for j in judges if j.bare.parameters > judge.bare.parameters]
    if larger:
        names = ", ".join(j.name for j in larger)
        found.append(
            f"{names}: nothing of it fits with headroom, quick enough and with bits enough (flow, step 5)"
        )
    if option.kv != asked.runtime.types[0] and asked.kv is None:
        room = f"keys and values in {option.kv} make room and are read quicker"
        found.append(rules.cited()["caches"] if judge.dominated() else room)
    floor, why = rules.least_bits(asked.job, option.parameters)
    if floor > asked.job.floor:
        found.append(why)
    if option.split is not None and option.split.experts_off:
        found.append(
            "a token sees few experts: they may be beside the card (guide, the mixture-of-experts wrinkle)"
        )
    if not option.against:
        found.append(f"{option.recipe} is the first of the ladder with nothing against it ({source})")
    return tuple(found)


def _second(chosen: Option, good: Sequence[Option], others: Sequence[Option]) -> tuple[Option | None, str]:
    """What came second, and why."""
    rest = [o for o in good if o is not chosen and (o.model, o.recipe) != (chosen.model, chosen.recipe)]
    others = [o for o in others if o is not chosen and o not in rest]
    rest += sorted(others, key=lambda o: (not _runs(o), o.last, len(o.against), -o.rate))
    rest = [o for o in rest if (o.model, o.recipe) != (chosen.model, chosen.recipe)]
    return (rest[0], _lost(rest[0], chosen)) if rest else (None, "")


def _lost(option: Option, chosen: Option) -> str:
    if option.against:
        return option.against[0]
    if _spilled(option) and not _spilled(chosen):
        return "parts of it are beside the card: what fits with headroom comes first (flow, step 2)"
    if option.parameters < chosen.parameters:
        return "a smaller model"
    if option.bits < chosen.bits:
        return f"fewer bits: {option.loss} against {chosen.loss}"
    sizes = [f"{o.memory.bytes_ / 1e9:.1f} GB" for o in (option, chosen)]
    return f"later in the ladder, and {sizes[0]} instead of {sizes[1]}"


def _shorter(judges: Sequence[Judge], recipes: Sequence[str]) -> tuple[tuple[Option, int], ...]:
    """The longest context of each model, by whatever recipe of the ladder leaves most room."""
    found = []
    for judge in judges:
        able = [
            o for o in judge.options(recipes, last=False) if not any("bits a weight" in a for a in o.against)
        ]
        if not able:
            continue
        least = min(able, key=lambda o: o.memory.bytes_)
        kv = next(kind for kind in judge.caches() if kind.name == least.kv)
        context = judge.most_context(least.recipe, kv)
        if context:
            nearer = Judge(judge.name, judge.bare, replace(judge.asked, context=context), recipes)
            found.append((nearer.option(least.recipe, kv, last=False), context))
    return tuple(found)
