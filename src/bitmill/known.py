"""Names people already use, and the recipe each stands for."""

from __future__ import annotations

from collections.abc import Mapping

from bitmill.allocation.mixture import Mixture


def _mlx(grid: str) -> str:
    """As ``mlx_lm.convert`` does: embedding and head too."""
    return f"nearest : {grid}, embed={grid}, head={grid} > mlx"


def _quarot() -> dict[str, str]:
    """QuaRot's networks: all rotations, weights by rows or groups, inputs clipped to 0.9 of their range, keys
    and values to 0.95 (arXiv 2404.00456)."""
    found = {}
    for bits in (4, 6, 8):
        rounding = f"input=int{bits}-token-clip0.9, cache=int{bits}-token-asym-clip0.95 > bitmill"
        grouped = f"input=int{bits}-g128-token-clip0.9, cache=int{bits}-token-asym-clip0.95 > bitmill"
        name = "quarot" if bits == 4 else f"quarot-w{bits}a{bits}kv{bits}"
        for solver, end in (("gptq", ""), ("nearest", "-rtn")):
            found[f"{name}{end}"] = f"{_ROTATED} + {solver} : int{bits}-channel-sym, {rounding}"
            found[f"{name}-g128{end}"] = f"{_ROTATED} + {solver} : int{bits}-g128-sym, {grouped}"
    return found


def _spinquant() -> dict[str, str]:
    """SpinQuant's networks: with the runtime's rotations, and without (arXiv 2405.16406)."""
    rounding = "int4-channel-sym, input=int4-token-asym, cache=int4-token-asym > bitmill"
    return {
        "spinquant": f"spinquant(r3=true, r4=true) + gptq : {rounding}",
        "spinquant-no-had": "spinquant + gptq : int4-channel-sym, input=int8-token > compressed-tensors",
    }


_ROTATED = "hadamard(r3=true, r4=true)"
_SMOOTHED = "hadamard + smoothattention + smoothquant(alpha={}, inner=true, norms=false)"
_QOQ = "input=int8-token, cache=int4-token-asym > bitmill"

KNOWN: Mapping[str, str] = {
    **{name.lower(): f"nearest : {name} > gguf" for name in Mixture.names()},
    "f16": "nearest : f16 > gguf",
    "bf16": "nearest : bf16 > gguf",
    "w8a8": "nearest : int8-channel-sym, input=int8-token > compressed-tensors",
    "w8a8-static": "smoothquant + nearest : int8-channel-sym, input=int8-tensor-static > compressed-tensors",
    "smoothquant": "smoothquant + nearest : int8-channel-sym, input=int8-token > compressed-tensors",
    "w4a8": "gptq : int4-g128-sym, input=int8-token > compressed-tensors",
    "w4afp8": "gptq : int4-g128-sym, input=fp8-e4m3-token > compressed-tensors",
    "w4a4": "hadamard + gptq : int4-g128-sym, input=int4-token > compressed-tensors",
    **_quarot(),
    **_spinquant(),
    "qoq": f"{_SMOOTHED.format(0.3)} + reorder + gptq : int4-g128-qoq, {_QOQ}",
    "qoq-channel": f"{_SMOOTHED.format(0.1)} + gptq : int4-channel-asym, {_QOQ}",
    "w8a16": "nearest : int8-channel-sym > compressed-tensors",
    "w4a16": "gptq : int4-g128-sym > compressed-tensors",
    "w4a16-asym": "gptq : int4-g128-asym > compressed-tensors",
    "w3a16": "gptq : int3-g128-sym > compressed-tensors",
    "w2a16": "gptq : int2-g128-sym > compressed-tensors",
    "gptq": "gptq : int4-g128-sym > gptq",
    "gptq-int4": "gptq : int4-g128-sym > gptq",
    "gptq-int4-g128": "gptq : int4-g128-sym > gptq",
    "gptq-int4-g64": "gptq : int4-g64-sym > gptq",
    "gptq-int4-g32": "gptq : int4-g32-sym > gptq",
    "gptq-int3-g128": "gptq : int3-g128-sym > gptq",
    "gptq-int2-g64": "gptq : int2-g64-sym > gptq",
    "gptq-int8": "gptq : int8-g128-sym > gptq",
    "gptq-v2": "gptq : int4-g128-asym > gptq(version=2)",
    "awq": "awq + clip : int4-g128-asym > awq",
    "awq-gemm": "awq + clip : int4-g128-asym > awq",
    "awq-g64": "awq + clip : int4-g64-asym > awq",
    "w4a16-awq": "awq + clip : int4-g128-asym > compressed-tensors",
    "awq-gptq": "awq + gptq : int4-g128-asym > compressed-tensors",
    "autoround": "autoround : int4-g128-sym > auto-round",
    "auto-round": "autoround : int4-g128-sym > auto-round",
    "efficientqat": "efficientqat + tune : int2-g64-asym > gptq(version=2)",
    "hqq": "hqq : int4-g64-fz > hqq",
    "bitnet": "nearest : ternary-tensor > bitnet",
    "spqr": "spqr : spqr3-g16-o1-act > spqr",
    **{f"mlx-{bits}bit": _mlx(f"int{bits}-g64-bias") for bits in (2, 3, 4, 5, 6, 8)},
    "mlx-mxfp4": _mlx("mxfp4"),
    "mlx-mxfp8": _mlx("mxfp8"),
    "mlx-nvfp4": _mlx("nvfp4-flat"),
    "nf4": "nearest : nf4-b64-dq > bitsandbytes",
    "fp4": "nearest : fp4-b64 > bitsandbytes",
    "int8": "nearest : llm-int8 > bitsandbytes",
    "llm-int8": "nearest : llm-int8 > bitsandbytes",
    "fp8": "nearest : fp8-e4m3-channel > compressed-tensors",
    "fp8-tensor": "nearest : fp8-e4m3-tensor > compressed-tensors",
    "fp8-dynamic": "nearest : fp8-e4m3-channel, input=fp8-e4m3-token > compressed-tensors",
    "fp8-static": "nearest : fp8-e4m3-tensor, input=fp8-e4m3-tensor-static > compressed-tensors",
    "fp8-block": "nearest : fp8-e4m3-b128 > compressed-tensors",
    "fp8-hf": "nearest : fp8-e4m3-b128 > fp8",
    "fp8-deepseek": "nearest : fp8-e4m3-b128 > fp8",
    "fp8-e5m2": "nearest : fp8-e5m2-tensor > fp8",
    "mxfp8-hf": "nearest : mxfp8 > fp8",
    "torchao-int8": "nearest : int8-channel-sym > torchao",
    "torchao-fp8": "nearest : fp8-e4m3-channel > torchao",
    "mxfp8": "nearest : mxfp8, input=mxfp8, dtype=bf16 > compressed-tensors",
    "mxfp8a16": "nearest : mxfp8, dtype=bf16 > compressed-tensors",
    "mxfp4": "gptq : mxfp4, input=mxfp4, dtype=bf16 > compressed-tensors",
    "mxfp4a16": "gptq : mxfp4, dtype=bf16 > compressed-tensors",
    "nvfp4": "gptq : nvfp4, input=nvfp4, dtype=bf16 > compressed-tensors",
    "nvfp4a16": "gptq : nvfp4, dtype=bf16 > compressed-tensors",
    "e8p": "hadamard + gptq : e8p > bitmill",
    "hf-f32": "nearest : f32 > safetensors",
    "hf-f16": "nearest : f16 > safetensors",
    "hf-bf16": "nearest : bf16 > safetensors",
}
"""Names people already use, in lower case with ``-``, and the recipe each stands for."""


PRESETS: Mapping[str, str] = {"best": "gptq(sweeps=4)", "fast": "nearest"}
"""What stands before the colon in ``best : Q4_K_M``: the least loss that the project knows how to reach in
the same bytes, and no calibration at all. What ``best`` means follows the evidence and may change."""
