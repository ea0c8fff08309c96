"""A prompt's cache in a safetensors file: what was read once need not be read again. Nothing in a file is
believed before it fits the model and the method it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from bitmill.checkpoint.safetensors import Header, read_header
from bitmill.core.caches import Layout
from bitmill.core.errors import BadFile, Refused
from bitmill.run.cache import PackedCache, PackedLayer, cache_of
from bitmill.run.store import Store

_METHOD, _MODEL, _TOKENS = "bitmill.cache", "bitmill.model", "tokens"
_DTYPES = {torch.uint8: "U8", torch.int16: "I16", torch.float16: "F16", torch.float32: "F32"} | {
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_DENSE = ("F16", "BF16")
_MOST_TOKENS = 1 << 24


def save_prompt(cache: PackedCache, path: Path | str, ids: Tensor, model: str = "") -> None:
    """Write what ``cache`` holds of the tokens ``ids`` (``sequences tokens``).

    Args:
        model: anything that tells the model from others, a digest of its file for instance.

    Raises:
        Refused: the cache holds another number of tokens or sequences, or states of a recurrent layer.
    """
    layers = cache.packed
    tokens = layers[0].k.tokens if layers else 0
    if len(layers) != len(cache.layers):
        raise Refused("a layer of this model keeps more than keys and values", fix="read the prompt again")
    if ids.dim() != 2 or ids.shape[1] != tokens or not tokens:
        raise Refused(
            f"the cache holds {tokens} tokens of each sequence, and {tuple(ids.shape)} are to be written",
            fix="the very tokens that went through the model",
        )
    held = {f"{i}.{s.part}.{name}": t for i, s in _stores(layers) for name, t in s.state().items()}
    held = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
    held["ids"] = ids.to("cpu", torch.int64).contiguous()
    facts = {_METHOD: str(cache.choice), _MODEL: model, _TOKENS: str(tokens)}
    facts |= {f"dropped.{i}.{s.part}": str(s.dropped) for i, s in _stores(layers)}
    partial = Path(f"{path}.partial")
    save_file(held, partial, facts)
    partial.replace(path)


def load_prompt(path: Path | str, config: PretrainedConfig, model: str = "") -> tuple[PackedCache, Tensor]:
    """The cache of a file that :func:`save_prompt` wrote, and the tokens it holds (``sequences tokens``).

    Args:
        config: of the model that is to go on from there.
        model: what :func:`save_prompt` was told of it.

    Raises:
        BadFile: the file is damaged, or is no cache.
        Refused: it belongs to another model.
    """
    path = Path(path)
    header = read_header(path)
    facts = header.metadata
    if _METHOD not in facts:
        raise BadFile("this is no cache of a prompt", where=str(path), fix="a file that save_prompt wrote")
    if facts.get(_MODEL, "") != model:
        raise Refused(
            f"the cache is of the model {facts.get(_MODEL, '')!r}, and this is {model!r}",
            where=str(path),
            fix="read the prompt again",
        )
    cache = cache_of(facts[_METHOD], config)
    tokens = _whole(facts, _TOKENS, _MOST_TOKENS, path)
    found = {record.name: (record.dtype, record.shape) for record in header.records}
    ids = found.get("ids")
    if ids is None or ids[0] != "I64" or len(ids[1]) != 2 or ids[1][1] != tokens or not ids[1][0]:
        raise BadFile(f"there are no ids of {tokens} tokens", where=str(path))
    wanted = {"ids"}
    for index, store in _stores(cache.packed):
        wanted |= _check(found, index, store, facts, path, config, (ids[1][0], tokens))
    if len(cache.packed) != len(cache.layers) or set(found) != wanted:
        odd = sorted(set(found) ^ wanted)[:1]
        raise BadFile(f"the file is of a model with other layers: {odd}", where=str(path))
    tensors = _read(path, header)
    for index, store in _stores(cache.packed):
        mine = f"{index}.{store.part}."
        state = {name.removeprefix(mine): t for name, t in tensors.items() if name.startswith(mine)}
        dropped = _whole(facts, f"dropped.{index}.{store.part}", tokens, path)
        try:
            store.restore(state, tokens, dropped)
        except ValueError as error:
            raise BadFile(str(error), where=f"{path}: {mine}") from error
    for layer in cache.packed:
        layer.is_initialized = True
    return cache, tensors["ids"]


def _stores(layers: list[PackedLayer]) -> list[tuple[int, Store]]:
    return [(index, store) for index, layer in enumerate(layers) for store in (layer.k, layer.v)]


def _check(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    index: int,
    store: Store,
    facts: Mapping[str, str],
    path: Path,
    config: PretrainedConfig,
    size: tuple[int, int],
) -> set[str]:
    """Names of this store's tensors, all of which have the type and shape that they must have."""
    start = f"{index}.{store.part}."
    dropped = _whole(facts, f"dropped.{index}.{store.part}", size[1], path)
    dtype, shape = found.get(f"{start}recent", ("", ()))
    heads, head = _heads(config)
    if dtype not in _DENSE or len(shape) != 4 or (shape[0], shape[1], shape[3]) != (size[0], heads, head):
        raise BadFile(
            f"{start}recent is {dtype} {shape}, for {size[0]} sequences of {heads} heads of {head}",
            where=str(path),
        )
    layout = store.method.layout(store.part, head)
    packed = size[1] - dropped - shape[2]
    if packed < 0 or packed % layout.run:
        raise BadFile(f"{start}recent holds {shape[2]} tokens, which leaves no whole runs", where=str(path))
    wanted = _tensors(layout, start, (size[0], heads, packed // layout.run))
    for name, kind in wanted.items():
        if found.get(name) != kind:
            raise BadFile(f"{name} is {found.get(name)}, and must be {kind}", where=str(path))
    return {*wanted, f"{start}recent"}


def _tensors(
    layout: Layout, start: str, size: tuple[int, int, int]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    packed = layout.fields if size[2] else {}
    found = {f"{start}{name}": (_DTYPES[dtype], (*size, *shape)) for name, (dtype, shape) in packed.items()}
    learned = {
        f"{start}learned.{name}": (_DTYPES[dtype], (size[1], *shape))
        for name, (dtype, shape) in layout.learned.items()
    }
    return found | learned


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    decoder = config.get_text_config(decoder=True)
    facts = decoder.to_dict()
    heads = facts.get("num_key_value_heads") or facts["num_attention_heads"]
    return int(heads), int(facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"])


def _whole(facts: Mapping[str, str], name: str, most: int, path: Path) -> int:
    text = facts.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= most):
        raise BadFile(f"{name} is {text!r}, and must be a number up to {most:,}", where=str(path))
    return int(text)


def _read(path: Path, header: Header) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {record.name: file.get_tensor(record.name) for record in header.records}
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot read the file: {error}", where=str(path)) from error
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadFile(f"{name} holds numbers that are not finite", where=str(path))
    return found
