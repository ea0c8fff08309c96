"""The Triton kernels that read packed caches, run by Triton's interpreter on the processor. No GPU is needed;
what they compile to is not run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bitmill.core import registry
from bitmill.core.caches import KEYS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.client

CASES = [
    ("turboquant-4", "k", 64, 70),
    ("turboquant-3", "k", 128, 70),
    ("turboquant-2.5", "k", 64, 70),
    ("turboquant-4-prod", "k", 48, 70),
    ("turboquant-6", "v", 64, 1),
    ("int4", "v", 64, 600),
    ("int8-token", "k", 64, 65),
    ("int4-g32-token-asym-clip0.95", "v", 64, 70),
    ("kivi-2", "k", 64, 96),
    ("kivi-4", "v", 64, 70),
    ("int4-channel-g64", "k", 64, 128),
    ("q4_0", "k", 64, 70),
    ("q4_1", "k", 32, 70),
    ("q5_0", "v", 64, 70),
    ("q5_1", "v", 64, 70),
    ("q8_0", "k", 96, 70),
    ("iq4_nl", "v", 64, 70),
    ("fp8", "k", 64, 70),
    ("qjl", "k", 64, 70),
]


def test_kernels_agree_with_plain_products() -> None:
    """In a process of their own: Triton looks for its interpreter's switch when it is first imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("there is no triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [f"{text}/{part}" for text, part, _, _ in CASES]


def check(text: str, part: str, head: int, tokens: int) -> None:
    """Scores and sums of a cache with room to spare, against those of unpacked coordinates."""
    kernels = import_module("bitmill.numerics.cache_triton")
    method = registry.cache_method(text)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, 2, -(-tokens // 256) * 256, head, generator=generator)
    code = method.code(part, head, method.learn(part, x))
    assert kernels.reads(code.direct)
    fields = {name: value.contiguous() for name, value in code.pack(x).items()}
    values = code.unpack(fields)[:, :, :tokens]
    queries = code.turned(torch.randn(2, 2, 3, head, generator=generator)).contiguous()
    wanted = queries @ values.mT
    found = kernels.scores(code.direct, fields, tokens, queries)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    weights = torch.rand(2, 2, 3, tokens, generator=generator)
    wanted = weights @ values
    found = kernels.sums(code.direct, fields, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


if __name__ == "__main__":
    module = import_module("bitmill.numerics.cache_triton")
    for without in ("polarquant", "f16"):
        assert not module.reads(registry.cache_method(without).code(KEYS, 64, {}).direct)
    for case in CASES:
        check(*case)
        print("/".join(case[:2]))
