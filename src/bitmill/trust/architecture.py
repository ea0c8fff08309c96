"""A model's tensors against its architecture: what is missing, unknown or of another shape.

Of a folder, transformers' own empty model says what there must be; of a GGUF file, the tables of the gguf
package, which llama.cpp's converter goes by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from huggingface_hub.errors import StrictDataclassError

from bitmill.calibrate.skeleton import empty_model
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.families.base import describe
from bitmill.trust.findings import Finding, of_error
from bitmill.trust.stored import Stored

_FAULTS = (
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What making a model of a stranger's configuration can end in."""

_BLOCK = re.compile(r"\.(\d+)\.")
_ENDS = (".weight", ".bias", ".scale", ".input_scale")
_SHOWN = 3
_BUFFERS = ("rotary_emb.inv_freq",)
_TIED = "lm_head.weight"


def of_checkpoint(checkpoint: Checkpoint) -> tuple[Finding, ...]:
    """Names and shapes of an open model's weights against transformers' own model of that configuration."""
    config = checkpoint.config
    try:
        wanted = {
            name: tuple(value.shape)
            for name, value in empty_model(config, torch.device("cpu")).state_dict().items()
        }
    except Refused as error:
        return (of_error(error, "architecture", "warning"),)
    except _FAULTS as error:
        what = f"transformers cannot make a model of this configuration: {str(error)[:200]}"
        return (Finding("error", "architecture", what, f"{checkpoint.path}: config.json"),)
    if describe(config).joined:
        wanted = {name: shape for name, shape in wanted.items() if not _BLOCK.search(name)}
        there = {n: f.shape for n, f in checkpoint.tensors.items() if not _BLOCK.search(n)}
    else:
        there = {n: f.shape for n, f in checkpoint.tensors.items()}
    return tuple(_compared(wanted, there, config, str(checkpoint.path)))


def _compared(
    wanted: Mapping[str, tuple[int, ...]],
    there: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    where: str,
) -> Iterator[Finding]:
    tied = bool(config.get("tie_word_embeddings"))
    missing = [name for name in wanted if name not in there and not (tied and name == _TIED)]
    if len(missing) == len(wanted):  # another naming altogether: a wrapper of several models
        what = "none of its tensors is called as transformers calls them; names and shapes are not compared"
        yield Finding("note", "architecture", what, where)
        return
    if missing:
        what = f"{_count(len(missing), 'tensor')} of the architecture {_is(missing)} missing"
        yield Finding("error", "architecture", what, _listed(missing), "fetch the whole model again")
    wrong = [name for name in wanted if name in there and there[name] != wanted[name]]
    if wrong:
        what = (
            f"{_count(len(wrong), 'tensor')} {_has(wrong)} another shape than config.json gives: the first "
        )
        what += f"is {list(there[wrong[0]])}, not {list(wanted[wrong[0]])}"
        yield Finding("error", "architecture", what, _listed(wrong), "config.json is another model's")
    more = [name for name in there if name not in wanted and not name.endswith(_BUFFERS)]
    if more:
        what = f"{_count(len(more), 'tensor')} {_is(more)} not of this architecture: nothing uses them"
        yield Finding("warning", "architecture", what, _listed(more))


def of_gguf(model: Stored) -> tuple[Finding, ...]:
    """Names of a GGUF file's tensors, and the number of its blocks, against llama.cpp's tables."""
    name = model.config.get("general.architecture")
    arch = next((key for key, text in MODEL_ARCH_NAMES.items() if text == name), None)
    if arch is None or arch not in MODEL_TENSORS:
        what = f"the installed gguf package knows no architecture {name!r}"
        fix = "pip install -U gguf, if it is new"
        return (Finding("warning", "architecture", what, f"{model.where}: general.architecture", fix),)
    known = {TENSOR_NAMES[kind] for kind in MODEL_TENSORS[arch]}
    stems = {part: _stem(part) for part in model.parts}
    strange = [part for part, stem in stems.items() if stem not in known]
    found = []
    if strange:
        what = f"{_count(len(strange), 'tensor')} {_is(strange)} not of the architecture {name!r}, and "
        what += "llama.cpp refuses a file with tensors that it has no place for"
        found.append(
            Finding("warning", "architecture", what, _listed(strange), "pip install -U gguf, if new")
        )
    blocks = {int(match[1]) for part in model.parts if (match := _BLOCK.search(part)) is not None}
    said = model.config.get(f"{name}.block_count")
    if type(said) is int and blocks and blocks != set(range(said)):
        gone = sorted(set(range(min(said, 1 << 16))) - blocks)
        what = f"the file says it has {said} blocks, and has tensors of {len(blocks)}"
        first = f"block {gone[0]} is the first missing" if gone else ""
        found.append(Finding("error", "architecture", what, first or model.where, "fetch the file again"))
    return tuple(found)


def _stem(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``blk.{bid}.attn_q``, as the tables spell it."""
    for end in _ENDS:
        name = name.removesuffix(end)
    return _BLOCK.sub(".{bid}.", f"{name}.", count=1).removesuffix(".")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _is(some: list[str]) -> str:
    return "are" if len(some) > 1 else "is"


def _has(some: list[str]) -> str:
    return "have" if len(some) > 1 else "has"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
