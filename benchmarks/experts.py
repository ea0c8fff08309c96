"""Experts: a small mixture is trained until its experts specialise; then calibrated on few tokens, by every
policy.

python benchmarks/experts.py [--family mixtral|qwen3moe] [--steps 600] [--windows 4 16] [--grid int3-g32-asym]
    [--budget q3_k] [--work FOLDER]

Trains a mixture of a few million parameters on text of several kinds that Python carries (minutes on two
cores), looks at which experts which kind is sent to, then compares KLD under `experts=route`, `until=N`,
`topk=N` and `all` with few calibration tokens, and experts on types by measured damage against one type for
all at equal bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from compare import EVIDENCE, machine, signature
from ruler import write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from bitmill import mill
from bitmill.budgeting import budgeted as bargain
from bitmill.calibrate.corpus import default_calibration, default_evaluation
from bitmill.calibrate.damage import measure_damage
from bitmill.calibrate.tokens import calibration_tokens
from bitmill.calibrate.windows import windows
from bitmill.measurement.measure import Protocol, measure_all
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_source

SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
MIXTURES = {
    "mixtral": lambda vocab: MixtralConfig(
        **SIZES, vocab_size=vocab, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2,
        router_aux_loss_coef=0.01, output_router_logits=True,
    ),
    "qwen3moe": lambda vocab: Qwen3MoeConfig(
        **SIZES, vocab_size=vocab, intermediate_size=256, moe_intermediate_size=256, num_experts=16,
        num_experts_per_tok=2, norm_topk_prob=True, router_aux_loss_coef=0.01, output_router_logits=True,
    ),
}  # fmt: skip
WINDOW = 128
NOTES = """A {family} of {parameters:,} parameters, trained here for {steps} steps of 16 windows of 128 tokens
on the kinds of text that the default calibration has ({minutes:.0f} minutes; loss {first:.2f} to {last:.2f}
nats). A kind of text sends {skew:.1f} times the mean number of tokens to its favourite expert of a block,
on average. KLD in nats a token against that model on text of four kinds, none of it learned; smaller is
better. `least` is the smallest number of tokens that an expert was sent, and was shown, in the whole
calibration."""


def tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The mixture, trained and stored, or found."""
    stored = folder / "training.json"
    if stored.is_file():
        return json.loads(stored.read_text(encoding="utf-8"))
    texts = default_calibration(None)
    words = tokenizer([document for text in texts for document in text.documents], 2048)
    drawn = windows(words, texts, WINDOW, options.windows_taught, seed=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MIXTURES[options.family](len(words)), dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    began, losses = time.monotonic(), []
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / options.steps)
        rows = torch.randint(len(drawn.tokens), (16,))
        loss = model(input_ids=drawn.tokens[rows], labels=drawn.tokens[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            print(f"step {step}: {losses[-1]:.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": (time.monotonic() - began) / 60,
        "first": losses[0],
        "last": sum(losses[-20:]) / len(losses[-20:]),
        "skew": _skew(model.eval(), drawn.tokens, drawn.origin),
    }
    write_json(stored, facts)
    return facts


@torch.no_grad()
def _skew(model: Any, tokens: Tensor, origin: tuple[int, ...]) -> float:
    """How much more than the mean a kind of text sends to its favourite expert, over kinds and blocks."""
    found: list[float] = []
    for kind in sorted(set(origin)):
        rows = [at for at, k in enumerate(origin) if k == kind][:16]
        seen: list[Tensor] = []
        hooks = [
            block.mlp.experts.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[1]))
            for block in model.model.layers
        ]
        model(tokens[rows])
        for hook in hooks:
            hook.remove()
        for chosen in seen:
            counts = chosen.reshape(-1).bincount().float()
            found.append(float(counts.max() / (chosen.numel() / len(model.model.layers[0].mlp.gate.weight))))
    return sum(found) / len(found)


def measured(options: argparse.Namespace, folder: Path, files: list[Path]) -> list[dict[str, float]]:
    """Mean KLD of each, over all kinds, with its interval."""
    protocol = Protocol(window=WINDOW, count=options.judges, floor=False)
    texts = [text for text in default_evaluation() if not text.empty]
    records = measure_all([str(f) for f in files], str(folder), texts=texts, protocol=protocol)
    kept = [record.to_json()["kld"] for record in records]
    ends = [k["ci95"] or (k["mean"], k["mean"]) for k in kept]  # one window alone has no interval
    return [{"kld": k["mean"], "low": low, "high": high} for k, (low, high) in zip(kept, ends, strict=True)]


def policies(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """KLD by policy and number of calibration windows."""
    rows, files = [], []
    source = open_source(str(folder))
    for count in options.windows:
        for policy in ("route", f"until={options.until}", f"until={4 * options.until}", "topk=4", "all"):
            out = options.work / f"experts-{options.family}-{count}-{policy.replace('=', '-')}"
            line = f"gptq : {options.grid}, experts={policy} > bitmill"
            report = mill.quantize(
                source, line, out, calib=["docs=1", "code=1"], nsamples=count, seqlen=WINDOW, force=True,
                resume=False,
            )  # fmt: skip
            told = report.to_json()["experts"]
            files.append(out)
            least = {"sent": told["sent"]["least"], "shown": told["shown_least"], "none": told["never_sent"]}
            rows.append({"tokens": count * WINDOW, "policy": policy, "seconds": report.seconds, **least})
    found = measured(options, folder, files)
    return [{**row, **kld} for row, kld in zip(rows, found, strict=True)]


def budgeted(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One type for all against types by measured damage in as many bytes: by stack in GGUF, by expert in
    Bitmill's own folders."""
    source, made = open_source(str(folder)), []
    drawn = calibration_tokens(
        source, None, nsamples=16, seqlen=WINDOW, seed=0, chat=False, progress=lambda *_: None
    )
    damage = measure_damage(source, drawn)
    for container, suffix in (("gguf", ".gguf"), ("bitmill", "")):
        plain, chosen = (options.work / f"{name}-{container}{suffix}" for name in ("uniform", "budget"))
        line = f"nearest : {options.budget}, embed=q8_0 > {container}"
        size = plan(parse(line), source).bytes_
        recipe = bargain(source, damage, size, solver="nearest", container=container).recipe
        for name, what, out in (("one type", line, plain), ("by damage", recipe, chosen)):
            mill.quantize(source, what, out, calib=drawn.tokens, force=True)
            made.append((f"{name}, {container}", out))
    found = measured(options, folder, [out for _, out in made])
    return [
        {"name": name, "bytes": size_of(out), **kld} for (name, out), kld in zip(made, found, strict=True)
    ]


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(f.stat().st_size for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=list(MIXTURES), default="mixtral")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows-taught", type=int, default=2000)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--judges", type=int, default=12, help="windows of each kind that are measured on")
    parser.add_argument("--until", type=int, default=128)
    parser.add_argument("--grid", default="int3-g32-asym")
    parser.add_argument("--budget", default="q3_k")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.work / f"mixture-{options.family}-{options.steps}"
    facts = train(options, folder)
    rows = policies(options, folder)
    sizes = budgeted(options, folder)
    about = {**machine(), "threads": options.threads}
    page = "experts" if options.family == "mixtral" else f"experts_{options.family}"
    write_json(
        options.evidence / f"{page}.json", {"about": about, "model": facts, "rows": rows, "budget": sizes}
    )
    lines = [
        "| tokens | experts= | KLD | interval | least sent | least shown | seconds |",
        "|--:|---|" + "--:|" * 5,
    ]
    for row in rows:
        lines.append(
            f"| {row['tokens']} | {row['policy']} | {row['kld']:.4f} | "
            f"{row['low']:.4f} … {row['high']:.4f} | {row['sent']} | {row['shown']} | {row['seconds']:.1f} |"
        )
    more = ["| types | bytes | KLD | interval |", "|---|--:|--:|--:|"]
    for row in sizes:
        more.append(
            f"| {row['name']} | {row['bytes']:,} | {row['kld']:.4f} | {row['low']:.4f} … {row['high']:.4f} |"
        )
    notes = NOTES.format(family=options.family, steps=options.steps, **facts)
    parts = ["# Experts", notes, "\n".join(lines), "\n".join(more), signature(about)]
    path = options.evidence / f"{page}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
