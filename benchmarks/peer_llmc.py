"""llm-compressor's GPTQ, AWQ or SmoothQuant on given calibration tokens; runs in an environment of its own.

What is kept is every block linear as its codes say, and every tensor that a transform has changed.
``seconds`` is the ``oneshot`` call alone, calibration included; loading and saving are in
``seconds_whole``. The peer's own defaults hold wherever the work does not fix a value: damping 0.01,
static activation order, 20 scales a search with duo scaling, exponent 0.5, error propagated block by
block, one window a batch unless ``--batch`` says otherwise.

    peers/llmc/bin/python benchmarks/peer_llmc.py MODEL TOKENS.safetensors OUT gptq --bits 4
"""

from __future__ import annotations

import time

import peer
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.modifier import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers")
HEAD = ["lm_head"]


def recipe(method: str, bits: int, group: int, symmetric: bool) -> list[Modifier]:
    """Weights of all linears but the head on an integer grid with groups; SmoothQuant's by rows, with
    inputs in 8 bits."""
    if method == "smoothquant":
        return [SmoothQuantModifier(), QuantizationModifier(targets="Linear", scheme="W8A8", ignore=HEAD)]
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "awq":
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=HEAD)]
    return [GPTQModifier(config_groups=groups, ignore=HEAD)]


def dense(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the quantized modules compute with, and every other tensor that is not what it was."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight_scale" in own:
            zero = own.get("weight_zero_point")
            found[f"{name}.weight"] = fake_quantize(
                module.weight.data,
                module.weight_scale.data,
                None if zero is None else zero.data,
                module.quantization_scheme.weights,
            )
    for name, value in model.state_dict().items():
        if name in before and name not in found and not torch.equal(value, before[name]):
            found[name] = value
    return found


def main() -> None:
    """Quantize and store."""
    parser = peer.arguments(__doc__)
    parser.add_argument("method", choices=("gptq", "awq", "smoothquant"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--batch", type=int, default=1, help="windows a forward pass")
    options = parser.parse_args()
    model = peer.opened(options)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    ids = load_file(options.tokens)["input_ids"]
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    if not torch.accelerator.is_available():
        # Its AWQ pins intermediates for copies to a device, which torch refuses where there is none.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    before = time.monotonic()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        dataset=dataset,
        recipe=recipe(options.method, options.bits, options.group, options.symmetric),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
        shuffle_calibration_samples=False,
        batch_size=options.batch,
    )
    seconds = time.monotonic() - before
    grid = f"int{options.bits}-g{options.group}-{'sym' if options.symmetric else 'asym'}"
    bpw = options.bits + (16 + options.bits * (not options.symmetric)) / options.group
    if options.method == "smoothquant":
        grid, bpw = "int8-channel-sym", 8.0
    peer.keep(
        options,
        dense(model, original),
        PACKAGES,
        peer=f"llm-compressor {options.method}",
        grid=grid,
        bpw=bpw,
        windows=list(ids.shape),
        batch=options.batch,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
