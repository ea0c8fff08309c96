"""What transformers knows about a model, without its weights: the empty skeleton and the places in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitmill.core.errors import Refused


def empty_model(config: Mapping[str, Any], device: torch.device) -> PreTrainedModel:
    """The model's skeleton: parameters on the meta device, buffers (rotary frequencies) real."""
    facts = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    model_type = str(facts.pop("model_type", ""))
    try:
        parsed = AutoConfig.for_model(model_type, **facts)
    except (ValueError, KeyError) as error:
        raise Refused(
            f"transformers does not know the architecture {model_type!r}",
            where="config.json: model_type",
            fix="upgrade transformers, or check the spelling; custom code inside a model folder is never run",
        ) from error
    # Fused attention cannot cap its scores; else transformers takes it where the model can be run with it.
    parsed._attn_implementation = "eager" if facts.get("attn_logit_softcapping") else None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    except ValueError as error:
        raise Refused(
            f"{model_type!r} is not a causal language model", where="config.json: model_type"
        ) from error
    for module in model.modules():
        names = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
        for name in names:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device=device)
        if names:
            model._init_weights(module)
    return model.eval()


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks."""
    count = int(model.config.num_hidden_layers)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise Refused(
        f"{type(model).__name__} has no list of {count} blocks",
        fix="quantize without calibration (solver nearest, hqq or clip)",
    )


def final_norm_path(model: PreTrainedModel, layers_path: str) -> str:
    """Path of the norm between the last block and the head."""
    body_path = layers_path.rpartition(".")[0]
    candidates = [
        name
        for name, _ in model.get_submodule(body_path).named_children()
        if name.endswith("norm") or "norm" in name
    ]
    if not candidates:
        raise Refused(f"{type(model).__name__} has no final norm beside its blocks")
    return f"{body_path}.{candidates[-1]}"


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Path of a module."""
    return next(path for path, module in model.named_modules() if module is wanted)


def scaled_logits(logits: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The three ways transformers' models bend their logits: a cap, a factor, a divisor."""
    cap, factor, divisor = (
        config.get(k) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    if factor:
        logits = logits * float(factor)
    if divisor:
        logits = logits / float(divisor)
    return torch.tanh(logits / cap) * cap if cap else logits
