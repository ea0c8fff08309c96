"""LLM.int8()'s arithmetic and bitsandbytes' in inference: bit for bit, on this processor's own kernels."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from bitmill.core.registry import parse_grid
from bitmill.numerics import llm_int8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _weight(out: int, columns: int, seed: int = 0) -> Tensor:
    w = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.03
    w[0] = 0
    w[1, 3] = 2.5
    return w.half().float()


def _inputs(tokens: int, columns: int, loud: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(tokens + loud)
    x = torch.randn(tokens, columns, generator=rng)
    x[:, torch.randperm(columns, generator=rng)[:loud]] *= 9
    x[-1] *= 0.01
    return x.to(dtype)


def _layer(w: Tensor, bias: Tensor | None, threshold: float) -> bnb.nn.Linear8bitLt:
    out, columns = w.shape
    layer = bnb.nn.Linear8bitLt(columns, out, bias is not None, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(w.clone(), has_fp16_weights=False, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu").eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_theirs(dtype: torch.dtype) -> None:
    w = _weight(48, 200)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(w.half())
    ours = parse_grid("llm-int8").round(w)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.params["absmax"][:, 0], absmax)
    back = bnb.functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(ours.dense(), back)
    assert torch.equal(ours.dense(dtype), back.to(dtype))


@pytest.mark.parametrize("threshold", [6.0, 2.0, 0.0])
@pytest.mark.parametrize(("tokens", "loud"), [(1, 0), (1, 3), (7, 0), (7, 5), (33, 64)])
def test_rows_of_activations_are_theirs(tokens: int, loud: int, threshold: float) -> None:
    x = _inputs(tokens, 256, loud, torch.float16)
    codes, absmax, features = bnb.functional.int8_vectorwise_quant(x.clone(), threshold=threshold)
    ours = llm_int8.quantize_rows(x, threshold)
    assert torch.equal(ours[0], codes) and torch.equal(ours[1], absmax)
    assert torch.equal(ours[2], features if features is not None else torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("loud", [0, 5])
@pytest.mark.parametrize("shape", [(1, 256), (9, 256), (2, 5, 256), (3, 1536)], ids=str)
@torch.no_grad()
def test_the_mixed_product_is_theirs(
    shape: tuple[int, ...], loud: int, threshold: float, dtype: torch.dtype
) -> None:
    columns = shape[-1]
    w = _weight(40, columns)
    x = _inputs(shape[0] * (shape[1] if len(shape) == 3 else 1), columns, loud, dtype).reshape(shape)
    quantized = parse_grid("llm-int8").round(w)
    absmax = quantized.params["absmax"][:, 0]
    for bias in (None, torch.randn(40, generator=torch.Generator().manual_seed(3)).to(dtype)):
        theirs = _layer(w, bias, threshold)(x.clone())
        ours = llm_int8.matmul(x, quantized.codes, absmax, bias, threshold)
        assert ours.dtype is theirs.dtype is dtype
        assert torch.equal(ours, theirs)


def test_loud_features_are_why_the_method_is() -> None:
    w, x = _weight(64, 512), _inputs(32, 512, 0, torch.float32)
    x[:, ::100] *= 60
    quantized = parse_grid("llm-int8").round(w)
    parts = quantized.codes, quantized.params["absmax"][:, 0]
    exact = x @ quantized.dense().T
    mixed, plain = (float((llm_int8.matmul(x, *parts, None, t) - exact).norm()) for t in (6.0, 0.0))
    assert mixed < 0.5 * plain


def test_sums_beyond_single_precision_are_exact() -> None:
    a = torch.full((1, 5000), 127, dtype=torch.int8)
    b = a.clone()
    b[0, -1] = 126
    assert int(llm_int8.product(a, b)) == 4999 * 127 * 127 + 127 * 126


def test_nothing_to_multiply() -> None:
    quantized = parse_grid("llm-int8").round(_weight(8, 16))
    parts = quantized.codes, quantized.params["absmax"][:, 0]
    assert llm_int8.matmul(torch.zeros(0, 16), *parts).shape == (0, 8)
    assert not llm_int8.matmul(torch.zeros(2, 16), *parts).any()
