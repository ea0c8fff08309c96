"""The model that is trained: of a checkpoint, or of its shape alone with random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.inputs import parse_inputs
from bitmill.core.types import Quantized, TensorFacts
from bitmill.families.base import LINEAR_ROLES, Family, describe, is_expert
from bitmill.run.load import load_model
from bitmill.ternary.linear import TernaryLinear

SHAPE = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv-heads": "num_key_value_heads",
    "head-dim": "head_dim",
}
"""Words of ``--shape``, and what config.json calls them."""

_OF_LAYERS = ("layer_types", "no_rope_layers")
_INPUTS = parse_inputs("bitnet-int8")


def reshaped(config: Mapping[str, Any], text: str) -> dict[str, Any]:
    """``config`` with what ``layers=4,hidden=128`` says.

    Raises:
        Refused: a word that is none, or no number.
    """
    made = dict(config)
    for part in filter(None, (p.strip() for p in text.split(","))):
        word, _, number = (p.strip() for p in part.partition("="))
        if word.replace("_", "-") not in SHAPE or not re.fullmatch(r"[1-9]\d{0,6}", number):
            raise Refused(f"--shape {part!r}", fix=f"WORD=NUMBER with the words {', '.join(SHAPE)}")
        made[SHAPE[word.replace("_", "-")]] = int(number)
    if text and "head-dim" not in text.replace("_", "-"):
        made["head_dim"] = made["hidden_size"] // made["num_attention_heads"]
    for key in _OF_LAYERS:
        if isinstance(made.get(key), list):
            told = made.pop(key)[: made["num_hidden_layers"]]
            made |= {key: told} if len(told) == made["num_hidden_layers"] else {}
    return made


@final
class Trained(Checkpoint):
    """A checkpoint whose weights are what a training makes of them; before that, only their shapes are known.

    Args:
        source: whose configuration and tokenizer it has.
        config: with another shape than the source's, perhaps.
        identity: what its weights will depend on.
    """

    def __init__(self, source: Checkpoint, config: Mapping[str, Any], identity: str) -> None:
        self.path: Path = source.path
        self._source, self._made, self._identity = source, dict(config), identity
        self.values: Mapping[str, Tensor] = {}
        self._facts = dict(source.tensors) if self._made == dict(source.config) else _facts(self._made)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._made

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    def read(self, name: str) -> Tensor:
        return self.values[name]

    def stored(self, name: str) -> Quantized | None:
        return None

    @property
    def carried(self) -> Mapping[str, bytes]:
        return self._source.carried

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    @property
    def digest(self) -> str:
        return self._identity


def ternary_model(
    source: Checkpoint, config: Mapping[str, Any], scratch: bool, seed: int, device: torch.device
) -> PreTrainedModel:
    """The model with ternary linears in its blocks, weights of ``source`` or random ones."""
    if scratch:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = _random(config)
    else:
        model = load_model(source)
    family = describe(config)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and _is_ternary(family, path):
            model.set_submodule(path, TernaryLinear(linear, _INPUTS))
    torch.nn.Module.to(model, device)
    model.requires_grad_()
    return model


def refuse_experts(tensors: Mapping[str, TensorFacts]) -> None:
    """Refuse a mixture: transformers runs its experts as stacks, which are no linears here.

    Raises:
        Refused: it is one.
    """
    name = next((name for name in tensors if is_expert(name)), None)
    if name is not None:
        raise Refused("experts of a mixture are not trained here", where=name, fix="a model without experts")


def _is_ternary(family: Family, path: str) -> bool:
    role, layer = family.role(f"{path}.weight")
    return layer is not None and role in LINEAR_ROLES


def _facts(config: Mapping[str, Any]) -> dict[str, TensorFacts]:
    with torch.device("meta"):
        model = _random(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    named = model.named_parameters()
    return {
        n: TensorFacts(n, tuple(p.shape), "f32") for n, p in named if not (tied and n == "lm_head.weight")
    }


def _random(config: Mapping[str, Any]) -> PreTrainedModel:
    facts = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map", "dtype")}
    kind = str(facts.pop("model_type"))
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **facts), dtype=torch.float32)
    except (ValueError, KeyError, ZeroDivisionError) as error:
        raise Refused(f"transformers makes no model of this shape: {error}", fix="another --shape") from error
