"""Any checkpoint as a transformers model with dense weights: for sampling from it, and for checking it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,  # the name that transformers 4 has too
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bitmill.checkpoint.tokenizer import load_tokenizer
from bitmill.core.axes import Checkpoint, cache_of, inputs_of
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Inputs
from bitmill.families.base import describe
from bitmill.numerics.cache import cache_changes, check_cache, watch_cache
from bitmill.numerics.inputs import check_inputs, input_hook
from bitmill.run.experts import linears_of, open_all_experts
from bitmill.source import open_source

LAYERS = "model.layers"
"""Where transformers' models have their blocks."""
_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load(
    model: str | Path | Checkpoint, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and its tokenizer, whatever it is stored in; every weight is decoded and held in ``dtype``.

    Args:
        model: anything :func:`~bitmill.source.open_source` takes, or an open checkpoint.
        dtype: of weights and computation.

    Raises:
        Refused: it cannot be opened, or is not a causal language model that transformers knows.
        BadFile: weights and config.json do not belong together.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_source(str(model))
    return load_model(checkpoint, dtype), load_tokenizer(checkpoint)


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, held: bool = False
) -> PreTrainedModel:
    """The model alone; see :func:`load`. No code of the model folder is run.

    Where the checkpoint says that the inputs of a linear are rounded, or the keys and values of a cache,
    hooks of the model round them; not those of the cache where they will be ``held`` so.
    """
    config = config_of(checkpoint)
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    made, found = family.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    _check(found, checkpoint)
    inputs = inputs_of(checkpoint)
    if inputs:
        _round(made, inputs, checkpoint)
    check_cache(made, cache_of(checkpoint), str(checkpoint.path))
    rounding = {} if held else cache_changes(cache_of(checkpoint))
    for path, change in rounding.items():
        watch_cache(made.get_submodule(path), change)
    text = checkpoint.carried.get("generation_config.json")
    if text is not None:
        made.generation_config = GenerationConfig.from_dict(json.loads(text))
    return made.eval()


def config_of(checkpoint: Checkpoint) -> PretrainedConfig:
    """What transformers makes of ``config.json``, without what it says of types and quantization.

    Raises:
        Refused: it is not that of a causal language model that transformers knows.
    """
    facts = {
        k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "auto_map", "dtype")
    }
    kind = str(facts.pop("model_type", ""))
    try:
        config = AutoConfig.for_model(kind, **facts)
        known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    except (ValueError, KeyError) as error:
        raise _unknown(kind, checkpoint) from error
    if not known:
        raise _unknown(kind, checkpoint)
    return config


def _unknown(kind: str, checkpoint: Checkpoint) -> Refused:
    return Refused(
        f"transformers knows no causal language model {kind!r}", where=f"{checkpoint.path}: model_type"
    )


def _round(model: PreTrainedModel, inputs: Mapping[str, Inputs], checkpoint: Checkpoint) -> None:
    """Hooks that round inputs as the checkpoint says."""
    family = describe(checkpoint.config)
    open_all_experts(model, LAYERS, family, checkpoint.tensors)
    linears = linears_of(model, family)
    check_inputs(linears, inputs, str(checkpoint.path))
    for name in inputs:
        linears[name].register_forward_pre_hook(input_hook(partial(inputs.get, name)))


def _check(found: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    for problem in _PROBLEMS:
        names = sorted(str(name) for name in found.get(problem) or ())
        if names:
            raise BadFile(
                f"{len(names)} {problem.replace('_', ' ')}, the first is {names[0]}",
                where=str(checkpoint.path),
                fix="config.json and the weights do not belong together",
            )
