"""``bitmill train-ternary``: train a model whose weights are -1, 0 and 1."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitmill.cli import say
from bitmill.cli import training as options
from bitmill.cli.options import Device, DryRun, Force, Json, Model, Out, Resume, Revision
from bitmill.cli.progress import Teller

if TYPE_CHECKING:
    from bitmill.account import Report


def train_ternary(
    model: Model,
    data: options.Data = None,
    out: Out = None,
    recipe: options.Written = "nearest : ternary-tensor > bitnet",
    scratch: options.Starting = False,
    shape: options.Shape = "",
    held_out: options.HeldOut = None,
    steps: options.Steps = 0,
    lr: options.Rate = 1e-3,
    batch: options.Batch = 16,
    context: options.Context = 256,
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
    """Train a model whose weights are -1, 0 and 1 times a scale, and its inputs eight bits (BitNet b1.58).

    From MODEL's weights, or from random ones of its shape or another. The linears of the blocks are ternary
    in every product from the first step on, so that what is judged is what is written: a folder that
    transformers loads, or llama.cpp's TQ1_0 and TQ2_0. Rounding a model to ternary without training destroys
    it.

        bitmill train-ternary smollm2 --data notes.txt -o out --scratch --shape layers=4,hidden=256,mlp=512
        bitmill train-ternary ./my-model --data corpus.txt -o my-model-1.58 --steps 2000
        bitmill train-ternary ./my-model --data corpus.txt --recipe TQ2_0 -o my-model.gguf --dry-run
    """
    from bitmill.source import open_source
    from bitmill.ternary.train import carry_out_plan, plan_ternary
    from bitmill.training.settings import Settings

    started = time.monotonic()
    data = options.named(data, out, dry_run, ("text is", "--data FILE.txt"), "my-ternary")
    told = Settings(steps, lr, batch, context, seed, optimizer, keep, micro_tokens, 1.0, True)
    source = open_source(model, revision=revision)
    asked: dict[str, Any] = {"recipe": recipe, "scratch": scratch, "shape": shape, "held_out": held_out}
    made = plan_ternary(source, data, told, **asked, device=device, out=out)

    def learn(out: Path, teller: Teller) -> Report:
        return carry_out_plan(made, out, started, force, resume, teller)

    options.carried_out(made, out, dry_run, json, learn, _account)


def _account(report: Report) -> None:
    zeros = report.tuning["zeros"]
    options.traced(report, f"loss in nats a token; {zeros:.0%} of the ternary weights are 0")
    say.result(options.ending(report))
