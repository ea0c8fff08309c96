"""Budgets against fixed mixtures: at each size, the budgeted file and the best mixture that is no larger.

    python benchmarks/budget.py [--bpw 2.5 3 3.5 4.5 6] [--solver nearest] [--work FOLDER] [--reuse]

On the wide model, where every row is a multiple of 256. The bits are those of the whole file. Damage is
measured once, on the first 16 windows of the calibration tokens; both sides calibrate on all of them, and
every tensor of the files is scored, embedding and head too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from compare import Bench, arguments, bench
from ruler import Ruler, Score
from safetensors.torch import load_file

import bitmill
from bitmill.allocation.mixture import Mixture
from bitmill.budgeting import Budgeted, budgeted, limit_of
from bitmill.calibrate.damage import WINDOWS, Damage, measure_damage
from bitmill.calibrate.tokens import Calibration

SIZES = (2.5, 3.0, 3.5, 4.5, 6.0)
NEAREST = 3  # mixtures below a budget that are made: the largest is not always the best
MEASURE = "--measure-damage"
NOTES = """At each budget (bits a weight of the whole file) the file whose types were chosen for it by
measured damage, and llama.cpp's mixtures that are no larger: the {nearest} largest of them, of which the best
counts. The same solver (`{solver}`) and calibration on both sides, 64 windows of 512 tokens of Python's
manual; the model is the wide one, and every tensor is scored. `predicted` is the sum of the measured damages.
KLD in nats."""


def damage_of(both: Bench) -> Damage:
    """The measurement, by a process of its own; made once, found again afterwards."""
    path = both.work / "results" / "budget damage.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        script = [sys.executable, __file__, MEASURE, str(both.wide_model), str(both.tokens), str(path)]
        subprocess.run(script, check=True)
    return Damage.load(path, bitmill.open_source(str(both.wide_model)))


def measure(model: str, tokens: str, path: str) -> None:
    """Take it."""
    ids = load_file(tokens)["input_ids"].long()
    measure_damage(bitmill.open_source(model), Calibration(ids[:: len(ids) // WINDOWS])).save(Path(path))


def mixtures(both: Bench, solver: str) -> dict[str, int]:
    """Bytes of every mixture's file, largest first."""
    source = bitmill.open_source(str(both.wide_model))
    plans = {
        name: bitmill.plan(bitmill.parse(f"{solver} : {name} > gguf"), source, calibrated=True)
        for name in Mixture.names()
    }
    sizes = {name: made.bytes_ for name, made in plans.items()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def scored(both: Bench, ruler: Ruler, recipe: str, name: str, bytes_: int) -> Mapping[str, Score]:
    """One file, made and scored whole."""
    folder, facts = both.run_bitmill(both.wide_model, recipe, name)
    assert facts["bytes"] <= bytes_, f"{name}: {facts['bytes']} bytes, {bytes_} were planned"
    scores = ruler.score_file(folder / facts["file"])
    parameters = sum(p.numel() for p in ruler.model.parameters())
    both.add(name, {**facts, "bpw": 8 * facts["bytes"] / parameters}, scores)
    return scores


def verdict(bpw: float, made: Budgeted, ours: Mapping[str, Score], theirs: Mapping[str, Any]) -> str:
    """One line: the budgeted file against the best mixture."""
    if not theirs:
        return f"- {bpw} bits: predicted {made.budget.damage:.4f}; no mixture is that small."
    best = min(theirs, key=lambda name: theirs[name]["other"].mean_kld)
    ratios = ", ".join(f"{ours[kind].mean_kld / theirs[best][kind].mean_kld:.2f} ({kind})" for kind in ours)
    return f"- {bpw} bits: predicted {made.budget.damage:.4f}; KLD is {ratios} of {best}'s, the best mixture."


def main(sizes: Sequence[float] = SIZES) -> None:
    """Every size."""
    parser = arguments(__doc__)
    parser.add_argument("--bpw", type=float, nargs="+", default=list(sizes))
    parser.add_argument("--solver", default="nearest")
    both = bench(options := parser.parse_args())
    ruler = Ruler(both.wide_model, both.work / "ruler-wide.safetensors")
    source = bitmill.open_source(str(both.wide_model))
    parameters = sum(prod(fact.shape) for fact in source.tensors.values())
    damage, fixed = damage_of(both), mixtures(both, options.solver)
    known: dict[str, Mapping[str, Score]] = {}
    lines = []
    for bpw in options.bpw:
        limit = limit_of(bpw, None, None, parameters)
        made = budgeted(source, damage, limit, solver=options.solver)
        ours = scored(both, ruler, str(made.recipe), f"budget {options.solver} {bpw}", limit)
        rivals = [name for name, bytes_ in fixed.items() if bytes_ <= limit][:NEAREST]
        for name in rivals:
            recipe = f"{options.solver} : {name} > gguf"
            if name not in known:
                known[name] = scored(both, ruler, recipe, f"mixture {options.solver} {name}", fixed[name])
        lines.append(verdict(bpw, made, ours, {name: known[name] for name in rivals}))
        print(lines[-1], flush=True)
    notes = NOTES.format(nearest=NEAREST, solver=options.solver)
    both.report("budget", "Budgets against mixtures", "\n\n".join([notes, "\n".join(lines)]))


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(*sys.argv[2:])
    else:
        main()
