"""A block's experts as linears of their own: what transformers multiplies as stacks, opened up, so that the
input of every single expert can be seen and rounded and its weights replaced."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from bitmill.families.base import Family

_GATED = {"gate_up_proj", "down_proj"}


class Experts(nn.Module):
    """Gated experts, called as transformers calls its stacks of them.

    Attributes:
        everywhere: whether an expert that no token is sent to sees one all the same, which counts for
            nothing: so that a single forward pass calls every linear.
    """

    def __init__(self, stack: nn.Module, leaves: Sequence[str]) -> None:
        super().__init__()
        joined, down = stack.get_parameter("gate_up_proj"), stack.get_parameter("down_proj")
        count, twice, width = joined.shape
        shapes = ((twice // 2, width), (twice // 2, width), tuple(down.shape[1:]))
        with torch.device("meta"):
            for expert in range(count):
                parts = {n: nn.Linear(i, o, bias=False) for n, (o, i) in zip(leaves, shapes, strict=True)}
                self.add_module(str(expert), nn.ModuleDict(parts))
        self._leaves, self._act = tuple(leaves), stack.get_submodule("act_fn")
        self.everywhere = False

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            hidden: ``tokens in``.
            chosen, shares: ``tokens k``: numbers of the experts, and what each one's output counts.
        """
        out = torch.zeros_like(hidden)
        for name, expert in self.named_children():
            if not isinstance(expert, nn.ModuleDict):
                continue  # the activation function
            token, place = torch.where(chosen == int(name))
            share = shares[token, place, None]
            if not len(token):
                if not self.everywhere:
                    continue
                token, share = token.new_zeros(1), shares.new_zeros(1, 1)
            gate, up, down = (expert[leaf] for leaf in self._leaves)
            x = hidden[token]
            made = down(self._act(gate(x)) * up(x)) * share
            out.index_add_(0, token, made.to(out.dtype))
        return out


def opened(layer: nn.Module, family: Family, stored: Collection[str]) -> None:
    """Put :class:`Experts` into ``layer``, in place, where transformers stacks what the checkpoint has apart.

    Args:
        stored: paths of the layer's tensors in the checkpoint.
    """
    for path, parts in family.joined.items():
        stack_path, _, leaf = path.rpartition(".")
        if leaf != "gate_up_proj" or "{}" not in parts[0] or path in stored:
            continue
        stack = layer.get_submodule(stack_path)
        if {name for name, _ in stack.named_parameters()} == _GATED:
            names = [*parts, *family.joined[f"{stack_path}.down_proj"]]
            parent, _, child = stack_path.rpartition(".")
            leaves = [name.rpartition(".")[2] for name in names]
            layer.get_submodule(parent).add_module(child, Experts(stack, leaves))
