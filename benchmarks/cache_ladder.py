"""What a packed cache does to the next token's distribution, rung by rung, and to finding a fact far back.

python benchmarks/cache_ladder.py [--contexts 4096 8192] [--scored 128] [--find 4096] [--stored]
                                  [--methods q4_0-rot turboquant-3 ...] [--peers quanto-4 hqq-4 fp8]

Small: --contexts 256 --scored 16 --find 0 --methods q8_0 turboquant-3 kivi-2 --evidence FOLDER

The prompt is read with an exact cache, once for all, and its keys and values are then stored by each method,
as transformers' QuantizedCache does with a prompt; the tokens that are scored come 64 at a time and are
stored as well. --stored reads the prompt through each method's cache, too: what bitmill run does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from cache_pages import arguments, opened, read, table, text_ids, write_page
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

from bitmill.core.errors import Refused
from bitmill.run.attention import attend_packed
from bitmill.run.cache import PackedCache, cache_of

METHODS = (
    "f16", "q8_0", "int8", "fp8", "fp8-token", "q5_1", "q5_0", "q5_0-rot", "q4_0", "q4_0-rot", "q4_1-rot",
    "iq4_nl-rot", "int4", "int4-rot", "int4-channel", "kivi-4", "turboquant-4", "turboquant-4-nc",
    "turboquant-4-prod", "polarquant", "turboquant-3.5", "turboquant-3", "turboquant-3-nc",
    "k=turboquant-4,v=turboquant-3", "int3-rot", "turboquant-2.5", "int2", "int2-rot", "kivi-2",
    "turboquant-2", "turboquant-2,ends=2", "qjl", "iq4_nl-rot,window=128", "int4-rot,window=128",
    "turboquant-4,window=128", "turboquant-3.5,window=128", "turboquant-3,window=128",
    "turboquant-2.5,window=128", "turboquant-2,window=128",
)  # fmt: skip
"""From many bits to few, then with the latest tokens exact."""
PEERS = ("quanto-4", "quanto-2", "hqq-4", "hqq-2", "fp8")
"""Backends of transformers' QuantizedCache, and bits."""
DEPTHS = 10
WORDS = (
    " tiger", " apple", " river", " castle", " piano", " garden", " silver", " bridge", " candle", " ocean",
    " forest", " mirror", " dragon", " window", " butter", " pepper",
)  # fmt: skip
FACT = " The secret word of the old lighthouse is{word}. "
QUESTION = " The secret word of the old lighthouse is"
NOTES = """KLD of the next token's distribution from the one with an exact cache, in nats a token, and how
often the best token is the same; bytes are those that the whole cache takes, measured, divided by its tokens.
The model's weights are the same everywhere, in float32. `transformers …` are the backends of its
QuantizedCache at their usual settings: groups of 64, and the latest 128 tokens as they are, which no other
row has unless its name says `window` (`kivi` and `qjl` keep 128, as their papers do)."""


def main() -> None:
    """Every context, then the facts."""
    parser = arguments(__doc__)
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--scored", type=int, default=128)
    parser.add_argument("--find", type=int, default=4096, help="tokens around a hidden fact; 0 for none")
    parser.add_argument("--stored", action="store_true", help="the prompt goes through each cache, too")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    options = parser.parse_args()
    model, tokenizer = opened(options)
    found: dict[str, Any] = {"stored": options.stored, "rungs": [], "facts": []}
    for context in options.contexts:
        found["rungs"] += list(rungs(model, tokenizer, context, options))
    if options.find:
        found["facts"] = facts(model, tokenizer, options)
    write_page(options, "cache_ladder", "The cache, rung by rung", [NOTES, *pages(found)], found)


def named(options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Every cache by name, and whether it is transformers' own."""
    yield from ((name, False) for name in options.methods)
    yield from ((name, True) for name in options.peers)


def rungs(
    model: PreTrainedModel, tokenizer: Any, context: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One context: every cache on the same tokens."""
    ids = text_ids(tokenizer, context + options.scored)
    prompt, rest = ids[:, :context], ids[:, context:]
    usual = DynamicCache(config=model.config)
    read(model, prompt, usual)
    held = [(layer.keys, layer.values) for layer in usual.layers]
    exact = follow(model, rest, usual)
    for name, peer in named(options):
        try:
            cache = peer_of(name, model) if peer else cache_of(name, model.config)
            start = time.perf_counter()
            scored = with_cache(model, cache, held, prompt, rest, options, peer)
        except (ImportError, Refused, ValueError, RuntimeError, AttributeError) as error:
            print(f"{name}: not here: {str(error).splitlines()[0]}", flush=True)
            continue
        kld = (exact.exp() * (exact - scored)).sum(-1).double()
        row = {
            "name": f"transformers {name}" if peer else name,
            "context": context,
            "kld": float(kld.mean()),
            "standard_error": float(kld.std() / sqrt(len(kld))),
            "median": float(kld.median()),
            "same_top": float((exact.argmax(-1) == scored.argmax(-1)).double().mean()),
            "bytes_a_token": bytes_of(cache) / (context + options.scored),
            "seconds": time.perf_counter() - start,
        }
        print(row, flush=True)
        yield row


def with_cache(
    model: PreTrainedModel,
    cache: Any,
    held: list[tuple[Tensor, Tensor]],
    prompt: Tensor,
    rest: Tensor,
    options: argparse.Namespace,
    peer: bool,
) -> Tensor:
    """Log-probabilities of what follows each of ``rest``."""
    before = model.config._attn_implementation
    if not peer:
        attend_packed(model)
    if options.stored and not peer:
        read(model, prompt, cache)
    else:
        fill(cache, held)
    scored = follow(model, rest, cache)
    model.set_attn_implementation(before)
    return scored


def fill(cache: Any, held: list[tuple[Tensor, Tensor]]) -> None:
    """Store a prompt's keys and values."""
    for index, (keys, values) in enumerate(held):
        if isinstance(cache, PackedCache):
            layer = cache.packed[index]
            layer.k.append(keys)
            layer.v.append(values)
            layer.is_initialized = True
        else:
            cache.update(keys, values, index)


@torch.inference_mode()
def follow(model: PreTrainedModel, ids: Tensor, cache: Any, piece: int = 64) -> Tensor:
    """Log-probabilities behind each token, ``tokens vocabulary``."""
    found = []
    for start in range(0, ids.shape[1], piece):
        part = ids[:, start : start + piece]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
        found.append(torch.log_softmax(logits[0].float(), -1))
    return torch.cat(found)


def peer_of(name: str, model: PreTrainedModel) -> QuantizedCache:
    """A QuantizedCache at its usual settings."""
    backend, _, bits = name.partition("-")
    if backend == "fp8":
        return QuantizedCache("fp8", model.config)
    return QuantizedCache(backend, model.config, nbits=int(bits))


def bytes_of(cache: Any) -> int:
    """Bytes that a cache holds."""
    if isinstance(cache, PackedCache):
        return cache.bytes_
    total = 0
    for layer in cache.layers:
        parts = [layer.keys, layer.values, layer._quantized_keys, layer._quantized_values]
        total += sum(nested_bytes(part) for part in parts)
    return total


def nested_bytes(value: Any) -> int:
    """Bytes of all tensors inside, those of tensor subclasses by their parts."""
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None or type(value) in (Tensor, torch.nn.Parameter):
            return value.nbytes
        return sum(nested_bytes(getattr(value, name)) for name in flatten()[0])
    if isinstance(value, dict):
        return sum(nested_bytes(part) for part in value.values())
    return sum(nested_bytes(part) for part in value) if isinstance(value, list | tuple) else 0


def facts(model: PreTrainedModel, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A fact at ten depths: is the right word the likeliest of those that could stand there?"""
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
    candidates = torch.tensor([ids[0] for ids in words if len(ids) == 1])
    if len(candidates) < DEPTHS:
        raise ValueError("too few words of one token")
    scores: dict[str, list[tuple[bool, float]]] = {}
    text = text_ids(tokenizer, options.find)[0]
    question = torch.tensor(tokenizer(QUESTION, add_special_tokens=False)["input_ids"])
    for depth in range(DEPTHS):
        right = depth % len(candidates)
        word = tokenizer.decode([int(candidates[right])])
        fact = torch.tensor(tokenizer(FACT.format(word=word), add_special_tokens=False)["input_ids"])
        at = (2 * depth + 1) * len(text) // (2 * DEPTHS)
        prompt = torch.cat((text[:at], fact, text[at:]))[None]
        usual = DynamicCache(config=model.config)
        read(model, prompt, usual)
        held = [(layer.keys, layer.values) for layer in usual.layers]
        for name, peer in [("16 bits", False), *named(options)]:
            try:
                text_of = "f32" if name == "16 bits" else name
                cache = peer_of(name, model) if peer else cache_of(text_of, model.config)
                scored = with_cache(model, cache, held, prompt, question[None], options, peer)[-1, candidates]
            except (ImportError, Refused, ValueError, RuntimeError, AttributeError):
                continue
            likely = scored.log_softmax(-1)
            entry = (int(likely.argmax()) == right, float(likely[right]))
            scores.setdefault(f"transformers {name}" if peer else name, []).append(entry)
        print(f"depth {depth + 1} of {DEPTHS}", flush=True)
    return [
        {
            "name": name,
            "context": options.find,
            "found": sum(good for good, _ in entries),
            "depths": len(entries),
            "log_probability": sum(value for _, value in entries) / len(entries),
        }
        for name, entries in scores.items()
    ]


def pages(found: dict[str, Any]) -> Iterator[str]:
    """The tables."""
    for context in dict.fromkeys(row["context"] for row in found["rungs"]):
        rows = [
            [
                row["name"],
                f"{row['bytes_a_token']:,.0f}",
                f"{row['kld']:.5f} ± {2 * row['standard_error']:.5f}",
                f"{row['median']:.5f}",
                f"{row['same_top']:.3f}",
                f"{row['seconds']:.1f}",
            ]
            for row in found["rungs"]
            if row["context"] == context
        ]
        columns = ["cache", "bytes a token", "KLD", "median", "same top", "seconds"]
        yield f"## {context:,} tokens\n\n" + table(columns, rows)
    if found["facts"]:
        rows = [
            [row["name"], f"{row['found']} of {row['depths']}", f"{row['log_probability']:.3f}"]
            for row in found["facts"]
        ]
        about = (
            f"One sentence at {DEPTHS} depths of {found['facts'][0]['context']:,} tokens, asked for at the "
        )
        about += "end. Found: the right word is likelier than all others that could stand there. The "
        about += "log-probability is that among those."
        yield "## A fact far back\n\n" + about + "\n\n" + table(["cache", "found", "log-probability"], rows)


if __name__ == "__main__":
    main()
