"""Products in half the bits: attention in pieces against torch's own, and only where it is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitmill.numerics import half
from bitmill.numerics.causal import MOST, causal_attention, is_plainly_causal

SHAPES = ((1, 4, 4, 1, 8), (2, 9, 3, 300, 16), (1, 4, 1, 128, 8), (3, 2, 2, 129, 24))


def _heads(batch: int, heads: int, groups: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    shapes = ((heads, width), (groups, width), (groups, width))
    query, key, value = (torch.randn(batch, n, tokens, d, generator=rng) for n, d in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_make_torchs_attention(shape: tuple[int, ...], scale: float | None) -> None:
    """Forwards and backwards, with as many keys as queries or fewer."""
    leaves = _heads(*shape)
    options = {"is_causal": True, "enable_gqa": True, "scale": scale}
    assert is_plainly_causal(*leaves, **options)  # type: ignore[arg-type]
    ours = causal_attention(*leaves, scale)
    theirs = scaled_dot_product_attention(*leaves, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    above = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    found = zip(*(torch.autograd.grad(made, leaves, above) for made in (ours, theirs)), strict=True)
    for one, other in found:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_is_asked_otherwise_is_torchs() -> None:
    query, key, value = _heads(2, 4, 2, 16, 8)
    assert not is_plainly_causal(query, key, value)
    assert not is_plainly_causal(query, key, value, is_causal=True)  # groups, and no word of them
    assert not is_plainly_causal(query, query, query, dropout_p=0.1, is_causal=True)
    assert not is_plainly_causal(query, query, query, torch.zeros(16, 16), is_causal=True)
    assert not is_plainly_causal(query[:, :, :1], query, query, is_causal=True)
    large = torch.empty(1, 2, int((MOST / 2) ** 0.5) + 1, 1, device="meta")
    assert not is_plainly_causal(large, large, large, is_causal=True)


def test_only_what_is_inside_is_computed_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_multiplies_bfloat16", lambda _: True)
    query, _, _ = _heads(2, 4, 4, 200, 8)
    plain = scaled_dot_product_attention(query, query, query, is_causal=True)
    with half.products_in_half(query.device, wanted=True):
        made = scaled_dot_product_attention(query, query, query, is_causal=True)
        every = scaled_dot_product_attention(query, query, query)
    assert made.dtype == every.dtype == torch.bfloat16
    assert not torch.equal(made.float(), plain)
    torch.testing.assert_close(made.float(), plain, rtol=0.02, atol=0.02)
    with half.products_in_half(query.device, wanted=False):
        assert torch.equal(scaled_dot_product_attention(query, query, query, is_causal=True), plain)
