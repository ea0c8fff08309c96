"""``bitmill finetune``: learn an adapter on a base that stays quantized."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitmill.cli import say
from bitmill.cli import training as options
from bitmill.cli.options import Device, DryRun, Force, Json, Model, Resume, Revision
from bitmill.cli.progress import Teller

if TYPE_CHECKING:
    from bitmill.account import Report


def finetune(
    model: Model,
    data: options.Data = None,
    out: options.Folder = None,
    base_grid: options.BaseGrid = None,
    held_out: options.HeldOut = None,
    steps: options.Steps = 0,
    rank: options.Rank = 16,
    alpha: options.Alpha = 32,
    lr: options.Rate = 2e-4,
    batch: options.Batch = 16,
    context: options.Context = 1024,
    micro_tokens: options.MicroTokens = 2048,
    optimizer: options.Optimizer = "auto",
    keep: options.Kept = "best",
    seed: options.Drawn = 0,
    device: Device = "cpu",
    force: Force = False,
    resume: Resume = True,
    revision: Revision = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Learn an adapter for MODEL on examples, on a base that stays quantized (QLoRA).

    The linears are frozen in NF4 with double quantization, or on any grid; a low-rank adapter beside each
    learns, through the quantized values. Of conversations only the answers are learned, in the model's own
    chat template; of prompt and completion, the completion. Examples that do not teach judge ten times, and
    the best step is what is written. The adapter is peft's: it loads on the original model. An interrupted
    run goes on where it was.

        bitmill finetune ./my-model --data chats.jsonl -o my-adapter
        bitmill finetune model-Q4_K_M.gguf --data notes.txt -o my-adapter --rank 8 --context 512
        bitmill finetune ./my-model --data pairs.jsonl --base-grid int4-g64-asym --dry-run
        bitmill merge ./my-model my-adapter Q4_K_M -o merged.gguf
    """
    from bitmill.adapters.finetune import carry_out_plan, plan_adapter
    from bitmill.source import open_source
    from bitmill.training.settings import Settings

    started = time.monotonic()
    ways = ("examples are", "--data FILE.jsonl, or FILE.txt")
    data = options.named(data, out, dry_run, ways, "my-adapter")
    told = Settings(steps, lr, batch, context, seed, optimizer, keep, micro_tokens)
    source = open_source(model, revision=revision)
    lora: dict[str, Any] = {"rank": rank, "alpha": alpha, "base_grid": base_grid, "held_out": held_out}
    made = plan_adapter(source, data, told, name=model, **lora, device=device, out=out)

    def learn(out: Path, teller: Teller) -> Report:
        return carry_out_plan(made, out, started, force, resume, teller)

    options.carried_out(made, out, dry_run, json, learn, _account)


def _account(report: Report) -> None:
    unit = "loss in nats an answer token: of the examples of those steps, and of those that do not teach"
    facts = options.traced(report, unit)
    held = {step: loss for step, _, loss in facts["trace"]}[facts["written_step"]]
    say.result(f"{options.ending(report)}; held out {facts['first']:.4f} -> {held:.4f}")
