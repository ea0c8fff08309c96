"""What stands behind the last block: the final norm, the head, and what a model does to its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.calibrate.skeleton import scaled_logits
from bitmill.core.types import Inputs
from bitmill.numerics.inputs import straight


@dataclass(frozen=True, eq=False)
class Head:
    """From the hidden states behind the last block to logits, differentiable.

    Attributes:
        norm_name: canonical name of the norm's weight.
        norm: the final norm.
        weight: of the head, ``V H`` float32.
        bias: of the head.
        inputs: how its input is rounded, if it is.
        config: of the model.
    """

    norm_name: str
    norm: nn.Module
    weight: Tensor
    bias: Tensor | None
    inputs: Inputs | None
    config: Mapping[str, Any]

    def logits(self, hidden: Tensor, norm: Tensor | None = None) -> Tensor:
        """Float32 logits ``… V`` of ``… H``, with ``norm`` in place of the norm's weight."""
        named = {} if norm is None else {"weight": norm}
        x = torch.func.functional_call(self.norm, named, (hidden,)).float()
        x = x if self.inputs is None else straight(self.inputs, x)
        out = x @ self.weight.T
        return scaled_logits(out if self.bias is None else out + self.bias.float(), self.config)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL divergence, in nats, of next-token distributions: logits ``n V`` to ``n``."""
    ours, theirs = (torch.log_softmax(logits, -1) for logits in (found, wanted))
    return (theirs.exp() * (theirs - ours)).sum(-1)
