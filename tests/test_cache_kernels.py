"""Compiled loops over packed caches, beside products with what is unpacked."""

from __future__ import annotations

import pytest
import torch

from bitmill.core import registry
from bitmill.core.caches import CacheMethod
from bitmill.numerics import cache_kernels as kernels

NONE = ("f16", "bf16", "f32")
"""What torch multiplies as it is."""
METHODS = [
    method
    for cls in registry.members("caches").values()
    if issubclass(cls, CacheMethod)
    for method in cls.examples()
]


def checked(text: str, part: str, head: int, tokens: int, queries: int = 3) -> None:
    """Scores and sums of a cache with room to spare, against those of unpacked coordinates."""
    method = registry.cache_method(text)
    generator = torch.Generator().manual_seed(tokens + head)
    room = -(-tokens // 256) * 256
    x = torch.randn(2, 2, room, head, generator=generator)
    x[..., head // 2] *= 5
    x[0, 0, 3] = 0
    code = method.code(part, head, method.learn(part, x))
    assert bool(code.direct) == (text not in NONE)
    if not code.direct:
        return
    fields = {name: value.contiguous() for name, value in code.pack(x).items()}
    values = code.unpack(fields)[:, :, :tokens]
    asked = code.turned(torch.randn(2, 2, queries, head, generator=generator)).contiguous()
    wanted = asked @ values.mT
    found = kernels.scores(code.direct, fields, tokens, asked)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))
    weights = torch.rand(2, 2, queries, tokens, generator=generator)
    wanted = weights @ values
    found = kernels.sums(code.direct, fields, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("text", sorted({str(method) for method in METHODS}))
@pytest.mark.parametrize("part", ["k", "v"])
def test_every_way_is_read_as_it_is_packed(text: str, part: str) -> None:
    checked(text, part, 64, 288 if registry.cache_method(text).layout(part, 64).run > 1 else 300)


@pytest.mark.parametrize(
    ("text", "head"),
    [("turboquant-3", 7), ("turboquant-5", 12), ("turboquant-2.25", 48), ("int3-g20-token", 40),
     ("int4-token", 4), ("int5-channel", 20), ("q5_1", 32), ("q8_0", 96), ("polarquant", 16),
     ("polarquant", 48), ("turboquant-6-prod", 80), ("fp8-token", 3), ("int8-g24-token-asym", 72)],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 33])
def test_heads_of_odd_sizes(text: str, head: int, tokens: int) -> None:
    method = registry.cache_method(text)
    assert method.refuses(head) is None
    checked(text, "k", head, tokens if method.layout("k", head).run == 1 else 32, queries=1)


def test_threads_share_the_work() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            checked("turboquant-4", "k", 128, 2500)
            checked("q4_0", "v", 128, 2500)
    finally:
        torch.set_num_threads(before)
