"""What each storage type costs at each tensor, in nats of KL divergence a token, before quantizing anything.

To second order KL(original ‖ changed) is half the change in the metric of the Fisher information (Kullback &
Leibler 1951), and the Fisher information of a weight is the mean square of its gradient when labels are drawn
from the model's own distribution: an error ``D`` costs ``½ E (Σ G ⊙ D)²`` with ``G`` the gradient of a whole
window's log-probability. Whole windows matter: an error of a value projection is the same at every position,
and attention adds up what single positions would only average. Errors of different weights are taken as
independent, and the mean square of ``G`` as a product of a factor by row and one by column (Martens & Grosse
2015 do as much), so that no memory of the model's size is needed.

One backward pass through activations serves every linear, the embedding and the head. The errors ``D`` are
those of rounding with importance, on a sample of rows drawn in proportion to what they can cost.

An expert of a mixture is felt only where tokens are sent to it: its damage is by how often it is used, too.
One that no token was sent to counts as if one had been, at its block's damage a token (Laplace's rule).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitmill.calibrate.tokens import Calibration
from bitmill.calibrate.windows import tokens_sha256
from bitmill.core import registry
from bitmill.core.axes import Checkpoint, cache_of, inputs_of
from bitmill.core.errors import BadFile, Refused, Unsolvable
from bitmill.core.experts import stack_of
from bitmill.families.base import LINEAR_ROLES, describe, is_expert
from bitmill.run.experts import open_all_experts, weight_name
from bitmill.run.load import LAYERS, load_model
from bitmill.run.memory import available_bytes

FILE_KIND = "bitmill-damage-1"
WINDOWS = 16
ROWS = 64  # of a tensor that are rounded
EXPERT_ROWS = 16  # of an expert's, which has many beside it that are stored as it is
IN_256 = (
    "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k",
    "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0",
)  # fmt: skip
"""Types for rows that are multiples of 256."""
IN_32 = ("q4_0", "iq4_nl", "q5_0", "q8_0")
"""Types for rows that are multiples of 32 only."""
OUTSIDE = ("embed", "head")

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, eq=False)
class Damage:
    """Measured damage of a model's tensors.

    Attributes:
        nats: by canonical tensor name and type: expected KL divergence, nats a token.
        facts: provenance: digest of the model, hash and number of the tokens, the text.
    """

    nats: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write as JSON; beside and renamed."""
        partial = path.with_name(path.name + ".partial")
        value = {
            "kind": FILE_KIND,
            "facts": dict(self.facts),
            "nats": {k: dict(v) for k, v in self.nats.items()},
        }
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, source: Checkpoint) -> Damage:
        """Read what :meth:`save` wrote.

        Raises:
            BadFile: it is no such file.
            Refused: it was measured on another model.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            ours = isinstance(value, dict) and value.get("kind") == FILE_KIND
            made = cls(_checked(value["nats"]), dict(value["facts"])) if ours else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadFile(f"not a measurement of damage: {error}", where=str(path)) from error
        if made is None:
            raise BadFile(
                "not a measurement of damage", where=str(path), fix="name a file that does not exist"
            )
        if made.facts.get("model") != source.digest:
            raise Refused(
                "this damage was measured on another model",
                where=str(path),
                fix="name a file that does not exist: it will be measured again",
            )
        return made


def measure_damage(
    source: Checkpoint,
    calibration: Calibration,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
    seed: int = 0,
    kinds: Sequence[str] = (),
) -> Damage:
    """Run the tokens through the whole model and back, then round a sample of every matrix to every type.

    Args:
        kinds: grids to round to, beside 16 bits; none for llama.cpp's types, by the width of a matrix.

    Raises:
        Refused: the model in float32 does not fit into memory, or has no linear weight.
        Unsolvable: a gradient is NaN or infinite.
    """
    _refuse_memory(source, calibration.tokens.shape[1], device)
    if inputs_of(source) or cache_of(source):
        raise Refused(
            "the source rounds the inputs of its layers or its cache, and no gradient goes through that",
            where=str(source.path),
            fix="measure damage on the original model",
        )
    model = load_model(source)
    open_all_experts(model, LAYERS, describe(source.config), source.tensors)
    nn.Module.to(model, device)  # transformers' own wraps this one, and hides its types
    taps = _felt(model, source, calibration.tokens.to(device), progress, seed)
    if not taps:
        raise Refused("no matrix of this model takes part in its forward pass as a linear layer")
    nats: dict[str, dict[str, float]] = {}
    groups, total = _groups(source, taps), calibration.tokens.numel()
    for done, (name, members) in enumerate(groups.items()):
        progress("damage", done, len(groups), name)
        samples = [
            _Sample.of(n, source.read(n).float(), taps[n], _importance(source, n, taps[n]), total)
            for n in members
        ]
        for kind in _menu(source, members[0], kinds):
            for sample, cost in zip(samples, _costs(samples, kind), strict=True):
                nats.setdefault(sample.name, {})[kind] = cost
    progress("damage", len(groups), len(groups), f"{len(nats)} tensors")
    tokens = calibration.tokens
    unseen = _unseen(source, taps, nats)
    facts = {
        "model": source.digest,
        "sha256": tokens_sha256(tokens),
        "windows": tokens.shape[0],
        "window": tokens.shape[1],
        "rows": ROWS,
        "seed": seed,
        "unseen": list(unseen),
        "text": [str(s["name"]) for s in calibration.facts.get("sources", ())],
    }
    nats |= unseen
    return Damage({n: nats[n] for n in source.tensors if n in nats}, facts)


class _Tap:
    """What is summed at one use of a matrix: squares of its gradient by row and column, ``x²`` by column."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns, self.square = (
            torch.zeros(n, dtype=torch.float64, device=device) for n in (rows, columns, columns)
        )
        self.tokens = 0

    def see(self, x: Tensor) -> None:
        """Inputs of a window, ``tokens in``."""
        self.tokens += x.shape[0]
        self.square += x.square().sum(0)

    def feel(self, gradient: Tensor, rows: Tensor | None = None) -> None:
        """A window's gradient, of all rows or of these."""
        squared = gradient.square()
        self.columns += squared.sum(0)
        if rows is None:
            self.rows += squared.sum(1)
        else:
            self.rows[rows] += squared.sum(1)

    def terms(self, total: int) -> tuple[Tensor, Tensor]:
        """Factors by row (float64) and column of half the mean squared gradient, by one of ``total`` tokens,
        on the CPU."""
        whole = max(float(self.columns.sum()), 1e-300)
        return (self.rows * 0.5 / total).cpu(), (self.columns / whole).float().cpu()


@dataclass(frozen=True, eq=False)
class _Sample:
    """Rows of a matrix that stand for all of it.

    Attributes:
        rows: their values.
        importance: of the columns, for rounding.
        terms: a pair of factors by row and by column for each use of the matrix; rows are scaled up.
    """

    name: str
    rows: Tensor
    importance: Tensor | None
    terms: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(
        cls, name: str, weight: Tensor, taps: Sequence[_Tap], importance: Tensor | None, total: int
    ) -> _Sample:
        """:data:`ROWS` rows at most, of an expert fewer, at equal steps of what losing whole rows would cost.

        An error is about in proportion to that, so that every draw stands for an equal share: a row of which
        nothing is felt (a token that does not occur) is not drawn.
        """
        terms, count = tuple(tap.terms(total) for tap in taps), EXPERT_ROWS if is_expert(name) else ROWS
        if len(weight) <= count:
            return cls(name, weight, importance, terms)
        stakes = sum(
            (r * (weight.square() @ c) for r, c in terms), torch.zeros(len(weight), dtype=torch.float64)
        )
        whole = stakes.sum()
        steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count * whole
        drawn, times = (
            torch.searchsorted(stakes.cumsum(0), steps).clamp_max(len(weight) - 1).unique(return_counts=True)
        )
        share = times * whole / count / stakes[drawn].clamp_min(1e-300)
        return cls(name, weight[drawn], importance, tuple((r[drawn] * share, c) for r, c in terms))


def _costs(samples: Sequence[_Sample], kind: str) -> list[float]:
    """Nats of each sample at a type; the samples have as many columns, and are rounded in one call."""
    rows = torch.cat([s.rows for s in samples])
    weighed = [s.importance.expand_as(s.rows) for s in samples if s.importance is not None]
    grid = registry.parse_grid(kind)
    error = (grid.round(rows, torch.cat(weighed) if weighed else None).dense() - rows).square()
    parts = error.split([len(s.rows) for s in samples])
    return [
        float(sum(((part @ c) * r).sum() for r, c in s.terms)) for s, part in zip(samples, parts, strict=True)
    ]


def _felt(
    model: PreTrainedModel, source: Checkpoint, tokens: Tensor, progress: Progress, seed: int
) -> dict[str, list[_Tap]]:
    """Sums at every use of a matrix, by the matrix' name; a tied head is a second use of the embedding."""
    model.requires_grad_(False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    taps: dict[str, list[_Tap]] = {}
    family = describe(source.config)
    for path, module in model.named_modules():
        name = weight_name(path, family)
        if module is head and name not in source.tensors:
            name = next(f"{p}.weight" for p, m in model.named_modules() if m is embedding)
        if name in source.tensors and (module is embedding or isinstance(module, nn.Linear)):
            rows, columns = source.tensors[name].shape
            tap = _Tap(rows, columns, tokens.device)
            taps.setdefault(name, []).append(tap)
            module.register_forward_hook(_table_hook(tap) if module is embedding else _linear_hook(tap))
    generator = torch.Generator(tokens.device).manual_seed(seed)
    for index, window in enumerate(tokens):
        progress("gradients", index, len(tokens), f"window {index}")
        logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        torch.log_softmax(logits, -1).gather(1, labels).sum().backward()
        del logits
    progress("gradients", len(tokens), len(tokens), f"{tokens.numel()} tokens")
    for name, found in taps.items():
        if not all(bool(torch.isfinite(tap.rows).all()) for tap in found):
            raise Unsolvable("gradients are NaN or infinite", where=f"output of {name}")
    return {name: found for name, found in taps.items() if all(tap.tokens for tap in found)}


def _unseen(
    source: Checkpoint, taps: Mapping[str, Sequence[_Tap]], nats: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Experts without tokens, each at what one token costs the others of its stack."""
    stacks: dict[str, list[str]] = {}
    for name in source.tensors:
        if is_expert(name) and len(source.tensors[name].shape) == 2:
            stacks.setdefault(stack_of(name), []).append(name)
    found: dict[str, dict[str, float]] = {}
    for names in stacks.values():
        seen = [name for name in names if name in nats]
        if seen:
            tokens = sum(taps[name][0].tokens for name in seen)
            one = {kind: sum(nats[name][kind] for name in seen) / tokens for kind in nats[seen[0]]}
            found |= {name: one for name in names if name not in nats}
    return found


def _linear_hook(tap: _Tap) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        tap.see(x)
        out.register_hook(lambda g: tap.feel(g.reshape(-1, g.shape[-1]).T @ x))

    return hook


def _table_hook(tap: _Tap) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        ids, at = args[0].reshape(-1).unique(return_inverse=True)
        table = module.get_parameter("weight")
        # Gemma's embedding multiplies what it looks up; an error of the table is multiplied too.
        gain = float(out.norm() / table[ids[at]].norm().clamp_min(1e-30))
        tap.tokens += len(at)
        out = out.detach().requires_grad_()

        def felt(g: Tensor) -> None:
            flat = g.reshape(-1, g.shape[-1]) * gain
            tap.feel(flat.new_zeros(len(ids), flat.shape[1]).index_add_(0, at, flat), ids)

        out.register_hook(felt)
        return out

    return hook


def _groups(source: Checkpoint, taps: Mapping[str, Sequence[_Tap]]) -> dict[str, list[str]]:
    """Tensors that are rounded in one call: of one block and width, or one alone outside the blocks."""
    family = describe(source.config)
    groups: dict[str, list[str]] = {}
    for name in taps:
        role, layer = family.role(name)
        if layer is not None and role in LINEAR_ROLES:
            columns = source.tensors[name].shape[1]
            groups.setdefault(f"block {layer}, {columns} columns", []).append(name)
        elif role in OUTSIDE:
            groups[name] = [name]
    return groups


def _menu(source: Checkpoint, name: str, kinds: Sequence[str]) -> Iterator[str]:
    """The types that a tensor's shape and role allow, and 16 bits as a last resort."""
    fact = source.tensors[name]
    inside = describe(source.config).role(name)[0] not in OUTSIDE
    if kinds:
        yield from (kind for kind in kinds if registry.parse_grid(kind).refuses(fact.shape) is None)
    else:
        usual = IN_256 if fact.shape[1] % 256 == 0 else IN_32 if fact.shape[1] % 32 == 0 else ()
        yield from (kind for kind in usual if inside or not kind.startswith("iq"))
    yield "bf16" if fact.dtype == "bf16" else "f16"


def _importance(source: Checkpoint, name: str, taps: Sequence[_Tap]) -> Tensor | None:
    """Mean squares of the inputs, as solvers of the blocks' weights have them; none outside the blocks."""
    if describe(source.config).role(name)[0] in OUTSIDE:
        return None
    return (taps[0].square / taps[0].tokens).float().cpu()


def _refuse_memory(source: Checkpoint, window: int, device: str) -> None:
    if torch.device(device).type != "cpu":
        return
    needed, free = memory_needed(source, window), available_bytes()
    if needed > free:
        raise Refused(
            f"measuring damage holds the whole model in float32: about {needed:,} bytes, {free:,} are free",
            where=str(source.path),
            fix="measure on a larger machine and carry the file over (--damage FILE), or name a mixture",
        )


def memory_needed(source: Checkpoint, window: int) -> int:
    """Bytes for the weights in float32 and one window's activations and logits; modelled."""
    facts = source.tensors.values()
    weights = sum(prod(fact.shape) for fact in facts)
    matrices = [fact.shape for fact in facts if len(fact.shape) == 2]
    alive = 3 * sum(rows + columns for rows, columns in matrices)  # inputs, outputs and what is between
    return 4 * weights + 4 * window * alive + (1 << 28)


def _checked(nats: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        str(name): {str(kind): float(cost) for kind, cost in kinds.items()} for name, kinds in nats.items()
    }
