"""A block's experts as linears of their own: what transformers multiplies as stacks, opened up, so that the
input of every single expert can be seen and rounded and its weights replaced.

An expert may be shown more tokens than its router sends it, so that it can be learned from them; what it
makes of those is not added to the model's own hidden states, which stay what they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.core.errors import Refused
from bitmill.core.experts import ExpertTokens
from bitmill.families.base import Family

_GATED = {"gate_up_proj", "down_proj"}
_BLOCK = re.compile(r"(model\.layers\.\d+\.)(.+)")


class Experts(nn.Module):
    """Gated experts, called as transformers calls its stacks of them.

    Attributes:
        everywhere: whether an expert that no token is sent to sees one all the same, which counts for
            nothing: so that a single forward pass calls every linear.
        tokens: which tokens an expert is shown.
        share: for ``until=N``: ``N`` a token of the whole calibration. Each forward pass shows its part of
            them, at least.
        sent: tokens that the router has sent each expert since this was last set to 0.
        watched: whether somebody looks at inputs; if not, tokens are neither counted nor shown to others.
    """

    def __init__(self, stack: nn.Module, leaves: Sequence[str]) -> None:
        super().__init__()
        joined, down = stack.get_parameter("gate_up_proj").data, stack.get_parameter("down_proj").data
        count = len(down)
        for expert in range(count):
            weights = (*joined[expert].chunk(2), down[expert])
            parts = {n: _linear(weight) for n, weight in zip(leaves, weights, strict=True)}
            self.add_module(str(expert), nn.ModuleDict(parts))
        self._leaves, self._act = tuple(leaves), stack.get_submodule("act_fn")
        self.everywhere = False
        self.tokens, self.share, self.watched = ExpertTokens(), 0.0, True
        self.sent = torch.zeros(count, dtype=torch.int64)
        self._scores: Tensor | None = None

    def offered(self, router: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        """A hook behind the router: its score of every expert for each token, which come first of what it
        puts out."""
        self._scores = made[0] if isinstance(made, tuple) else made

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            hidden: ``tokens in``.
            chosen, shares: ``tokens k``: numbers of the experts, and what each one's output counts.
        """
        out = torch.zeros_like(hidden)
        shown = self._shown(hidden, chosen)
        for name, expert in self.named_children():
            if not isinstance(expert, nn.ModuleDict):
                continue  # the activation function
            token, place = torch.where(chosen == int(name))
            share = shares[token, place, None]
            self.sent[int(name)] += len(token) * self.watched
            more = token[:0] if shown is None else shown[:, int(name)].nonzero()[:, 0]
            if not len(token) and not len(more):
                if not self.everywhere:
                    continue
                token, share = token.new_zeros(1), shares.new_zeros(1, 1)
            gate, up, down = (expert[leaf] for leaf in self._leaves)
            x = hidden[torch.cat([token, more])]
            made = down(self._act(gate(x)) * up(x))[: len(token)] * share
            out.index_add_(0, token, made.to(out.dtype))
        return out

    def _shown(self, hidden: Tensor, chosen: Tensor) -> Tensor | None:
        """``tokens experts``: what each expert is shown beside the tokens that it is sent; None for nothing.

        Raises:
            Refused: that goes by the router's scores, and there are none for every token and expert.
        """
        scores, self._scores = self._scores, None
        if self.tokens.kind == "route" or not self.watched:
            return None
        count = len(self.sent)
        sent = torch.zeros(len(hidden), count, dtype=torch.bool, device=hidden.device)
        sent.scatter_(1, chosen, True)
        if self.tokens.kind == "all":
            return ~sent
        if scores is None or scores.shape != sent.shape:
            raise Refused(
                f"experts={self.tokens} goes by the router's scores, which this model does not give",
                fix="experts=all, or experts=route",
            )
        if self.tokens.kind == "topk":
            first = scores.topk(min(self.tokens.count, count), 1).indices
            return torch.zeros_like(sent).scatter_(1, first, True) & ~sent
        lacking = (math.ceil(self.share * len(hidden)) - sent.sum(0)).clamp_min(0)
        order = scores.float().masked_fill(sent, -math.inf).argsort(dim=0, descending=True, stable=True)
        return (order.argsort(dim=0) < lacking) & ~sent


def _linear(weight: Tensor) -> nn.Linear:
    """One that multiplies by this very memory."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def open_experts(block: nn.Module, prefix: str, family: Family, stored: Container[str]) -> None:
    """Put :class:`Experts` into ``block``, in place, where transformers stacks what the checkpoint has apart.

    Their weights are the stacks' memory.

    Args:
        prefix: of the names of the block's tensors.
        stored: names of the checkpoint's tensors.
    """
    for stack, parts in family.joined.items():
        module, _, leaf = stack.rpartition(".")
        if leaf == "gate_up_proj" and "{}" in parts[0] and f"{prefix}{stack}" not in stored:
            _open(block, module, parts + family.joined[f"{module}.down_proj"], family)


def open_all_experts(model: nn.Module, layers: str, family: Family, stored: Container[str]) -> None:
    """:func:`open_experts` in every block of the list at ``layers``."""
    for index, block in model.get_submodule(layers).named_children() if family.has_single_experts else ():
        open_experts(block, f"{layers}.{index}.", family, stored)


def linears_of(model: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """Every linear by the name that a checkpoint has for its weight, those of opened experts among them."""
    return {
        weight_name(path, family): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def weight_name(path: str, family: Family) -> str:
    """What a checkpoint calls the weight of a module of the model."""
    block = _BLOCK.match(path)
    return f"{path if block is None else block[1] + family.canonical(block[2])}.weight"


def _open(block: nn.Module, path: str, parts: Sequence[str], family: Family) -> None:
    stack = block.get_submodule(path)
    if {name for name, _ in stack.named_parameters()} != _GATED:
        return
    experts = Experts(stack, [part.rpartition(".")[2] for part in parts])
    parent, _, child = path.rpartition(".")
    block.get_submodule(parent).add_module(child, experts)
    router = next((family.inside(p) for p, role in family.names.items() if role == "router"), None)
    if router is not None:
        block.get_submodule(router).register_forward_hook(experts.offered)
