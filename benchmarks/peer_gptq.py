"""llm-compressor's GPTQ on given calibration tokens; runs in an environment of its own.

Writes ``linears.safetensors`` (every quantized weight, dense float32) and ``facts.json`` (seconds,
peak memory, versions) into OUT. ``seconds`` is the ``oneshot`` call alone, calibration included;
loading and saving are in ``seconds_whole``. The peer's own defaults hold wherever the work does not
fix a value: damping 0.01, static activation order, error propagated block by block, one window a
batch unless ``--batch`` says otherwise.

    peers/llmc/bin/python benchmarks/peer_gptq.py MODEL TOKENS.safetensors OUT --bits 4
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

STARTED = time.monotonic()

import torch  # noqa: E402  (the clock starts before the imports, as a user's does)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from peak import peak_rss_mib  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def recipe(bits: int, group: int, symmetric: bool) -> GPTQModifier:
    """Weights of all linears but the head on an integer grid with groups."""
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def dense_linears(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the quantized modules compute with: their weights rounded to their own codes."""
    found = {}
    for name, module in model.named_modules():
        if "weight_scale" in dict(module.named_parameters(recurse=False)):
            rounded = fake_quantize(
                module.weight.data,
                module.weight_scale.data,
                module.weight_zero_point.data if "weight_zero_point" in module._parameters else None,
                module.quantization_scheme.weights,
            )
            found[f"{name}.weight"] = rounded.float().contiguous()
    return found


def main() -> None:
    """Quantize and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors file with input_ids, windows by length")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--batch", type=int, default=1, help="windows a forward pass")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = load_file(arguments.tokens)["input_ids"]
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    before = time.monotonic()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=recipe(arguments.bits, arguments.group, arguments.symmetric),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
        shuffle_calibration_samples=False,
        batch_size=arguments.batch,
    )
    seconds = time.monotonic() - before
    arguments.out.mkdir(parents=True, exist_ok=True)
    linears = dense_linears(model)
    save_file(linears, arguments.out / "linears.safetensors")
    facts = {
        "peer": "llm-compressor GPTQ",
        "grid": f"int{arguments.bits}-g{arguments.group}-{'sym' if arguments.symmetric else 'asym'}",
        "bpw": arguments.bits + (16 + arguments.bits * (not arguments.symmetric)) / arguments.group,
        "linears": len(linears),
        "windows": list(ids.shape),
        "batch": arguments.batch,
        "threads": arguments.threads,
        "seconds": seconds,
        "seconds_whole": time.monotonic() - STARTED,
        "peak_rss_mib": peak_rss_mib(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    (arguments.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
