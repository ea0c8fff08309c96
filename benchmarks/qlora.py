"""QLoRA on a small task: loss before and after, minutes and peak memory, on a 4-bit base and on one in 16
bits.

python benchmarks/qlora.py [--model FOLDER] [--steps 60] [--examples 600] [--bases nf4-b64-dq bf16 ...]
    [--peer] [--work FOLDER]

The task: an order in words becomes a line of JSON; the answers alone count. Every base has the same
examples, steps and seed, and a process of its own, whose anonymous memory is looked at ten times a second.
``--peer`` adds bitsandbytes' NF4 under plain peft, same examples, order, rate and rank, on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from compare import EVIDENCE, machine, signature
from fixture import off_grid
from ruler import write_json

THINGS = ("apples", "lamps", "chairs", "books", "tables", "pens", "cups", "ropes", "boxes", "stones")
PLACES = ("Oslo", "Lima", "Cairo", "Delhi", "Perth", "Quito", "Turin", "Osaka")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NOTES = """An order in words becomes a line of JSON; loss in nats an answer token on {judges} held-out
examples, before and after {steps} steps of {batch} examples (rank {rank}, learning rate {lr}, {threads}
threads). Peak: most anonymous memory of the process, looked at ten times a second, the interpreter with
torch and transformers included (`base` is what the frozen linears hold of it). `bf16` is the same run with
the base in 16 bits; `peft` and `bitsandbytes` is the same job in their own loop."""


def examples(path: Path, count: int) -> Path:
    """Orders and their JSON, drawn by a fixed seed."""
    draw = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            at, thing, place = draw.randrange(len(NUMBERS)), draw.choice(THINGS), draw.choice(PLACES)
            days = draw.randrange(2, 30)
            asked = f"Please send {NUMBERS[at]} {thing} to {place} within {days} days."
            said = json.dumps({"item": thing, "count": at + 2, "to": place, "days": days})
            talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": talk}) + "\n")
    return path


class Watched:
    """Anonymous memory of this process at its largest, in bytes."""

    def __init__(self) -> None:
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            text = Path("/proc/self/status").read_text(encoding="utf-8")
            found = next(line for line in text.splitlines() if line.startswith("RssAnon"))
            self.most = max(self.most, int(found.split()[1]) * 1024)


def ours(options: argparse.Namespace, base: str) -> dict[str, Any]:
    """One run of ``bitmill.finetune``."""
    from bitmill.adapters.finetune import finetune

    out = options.work / f"adapter-{base}"
    report = finetune(
        str(options.model), options.work / "orders.jsonl", out, settings=_settings(options),
        rank=options.rank, alpha=2 * options.rank, base_grid=base, force=True, resume=False,
    )  # fmt: skip
    facts = report.tuning
    held = {step: loss for step, _, loss in facts["trace"]}[facts["written_step"]]
    return {"before": facts["first"], "after": held, "seconds": report.seconds, "base": facts["base_bytes"]}


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """bitsandbytes' NF4 with double quantization under plain peft: the same examples in the same order."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from bitmill.checkpoint.tokenizer import load_tokenizer
    from bitmill.source import open_source
    from bitmill.training.lessons import read_lessons

    settings, started = _settings(options), time.monotonic()
    lessons = read_lessons(
        options.work / "orders.jsonl", load_tokenizer(open_source(str(options.model))), settings.context, 0
    )
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=four, dtype=torch.float32, device_map="cpu"
    )
    torch.manual_seed(0)
    told = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, told)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, settings.lr, weight_decay=0.0)

    def loss(batch: Any) -> Any:
        ids = torch.nn.utils.rnn.pad_sequence([x.ids for x in batch], batch_first=True)
        counts = torch.nn.utils.rnn.pad_sequence([x.counts for x in batch], batch_first=True)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        wanted = torch.where(counts, ids, -100)[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")

    def judged() -> float:
        with torch.no_grad():
            total = sum(float(loss([x])) for x in lessons.judges)
        return total / sum(x.answers for x in lessons.judges)

    before = judged()
    model.train()
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.rate(step, settings.steps)
        batch = lessons.batch(step, settings.batch, 0)
        (loss(batch) / sum(x.answers for x in batch)).backward()
        torch.nn.utils.clip_grad_norm_(learned, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {"before": before, "after": judged(), "seconds": time.monotonic() - started}


def _settings(options: argparse.Namespace) -> Any:
    from bitmill.training.settings import Settings

    return Settings(steps=options.steps, lr=options.lr, batch=options.batch, context=256, micro_tokens=512)


def one(options: argparse.Namespace) -> None:
    """A row, in this process."""
    import torch

    torch.set_num_threads(options.threads)
    with Watched() as watched:
        row = peer(options) if options.one == "peer" else ours(options, options.one)
    print(json.dumps({**row, "peak": watched.most}))


def main() -> None:
    """Every base as a process, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bases", nargs="+", default=["nf4-b64-dq", "int4-g64-asym", "bf16"])
    parser.add_argument("--peer", action="store_true", help="bitsandbytes under plain peft, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.model = options.model or off_grid(options.work / "fixture")
    if options.one:
        one(options)
        return
    examples(options.work / "orders.jsonl", options.examples)
    rows = []
    for name in [*options.bases, *(["peer"] if options.peer else [])]:
        words = [*sys.argv[1:], "--model", str(options.model), "--one", name]
        load = os.getloadavg()[0]
        done = subprocess.run(
            [sys.executable, str(Path(__file__)), *words], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        label = "bitsandbytes nf4, peft" if name == "peer" else name
        rows.append({"name": label, **json.loads(done.stdout.splitlines()[-1]), "load_before": load})
        print(rows[-1], flush=True)
    _report(options, rows)


def _report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    about = {**machine(), "threads": options.threads}
    write_json(options.evidence / "qlora.json", {"about": about, "options": _plain(options), "rows": rows})
    lines = [
        "| base | loss before | after | minutes | peak MiB | base MiB | load before |",
        "|---|" + "--:|" * 6,
    ]
    for row in rows:
        held = f"{row['base'] / 2**20:.0f}" if "base" in row else ""
        lines.append(
            f"| {row['name']} | {row['before']:.4f} | {row['after']:.4f} | {row['seconds'] / 60:.1f} | "
            f"{row['peak'] / 2**20:.0f} | {held} | {row['load_before']:.1f} |"
        )
    judges = min(64, max(1, options.examples // 10))
    notes = NOTES.format(judges=judges, **vars(options))
    path = options.evidence / "qlora.md"
    path.write_text(
        "\n\n".join(["# QLoRA", notes, "\n".join(lines), signature(about)]) + "\n", encoding="utf-8"
    )
    print(path)


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    kept = ("steps", "examples", "batch", "rank", "lr", "bases")
    return {key: vars(options)[key] for key in kept}


if __name__ == "__main__":
    main()
