"""Laws of a way to store keys and values, over every member that is found."""

from __future__ import annotations

import pytest
import torch

from bitmill.core import registry
from bitmill.core.cache_choice import cache_choice
from bitmill.core.caches import CacheCode, CacheMethod, Layout, stored_bytes
from bitmill.core.errors import Refused
from bitmill.run.store import Store

METHODS = [
    method
    for cls in registry.members("caches").values()
    if issubclass(cls, CacheMethod)
    for method in cls.examples()
]
every = pytest.mark.parametrize("method", METHODS, ids=str)
parts = pytest.mark.parametrize("part", ["k", "v"])


def vectors(tokens: int, head: int = 64, seed: int = 0) -> torch.Tensor:
    """Keys of two sequences and three heads, one channel of which stands out."""
    x = torch.randn(2, 3, tokens, head, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 6
    return x


def coded(method: CacheMethod, part: str, x: torch.Tensor) -> tuple[Layout, CacheCode]:
    """Layout and code after the first tokens ``x``."""
    head = x.shape[-1]
    return method.layout(part, head), method.code(part, head, method.learn(part, x))


@every
def test_text_and_back(method: CacheMethod) -> None:
    assert registry.cache_method(str(method)) == method
    assert type(method).parse(str(method)) == method and type(method).parse("nothing") is None
    assert cache_choice(str(method)).keys == method


@every
@parts
@pytest.mark.parametrize("head", [32, 64, 80, 96, 128])
def test_stored_is_what_the_layout_says(method: CacheMethod, part: str, head: int) -> None:
    if method.refuses(head) is not None:
        assert head in (32, 80, 96)
        return
    x = vectors(64, head)
    layout, code = coded(method, part, x)
    packed = code.pack(x)
    for name, (dtype, shape) in layout.fields.items():
        assert packed[name].dtype == dtype
        assert packed[name].shape == (2, 3, 64 // layout.run, *shape)
    assert set(packed) == set(layout.fields)
    bytes_ = sum(value.nbytes for value in packed.values())
    assert bytes_ == 2 * 3 * 64 // layout.run * layout.bytes_
    back = code.back(code.unpack(packed))
    assert back.shape == x.shape and back.dtype == torch.float32


@every
@parts
def test_packing_depends_on_no_neighbour(method: CacheMethod, part: str) -> None:
    x = vectors(64)
    layout, code = coded(method, part, x)
    whole = code.pack(x)
    alone = [code.pack(x[:, :, start : start + layout.run]) for start in range(0, 64, layout.run)]
    for name, value in whole.items():
        apart = torch.cat([one[name] for one in alone], 2) != value
        assert float(apart.float().mean()) < 0.02, "beyond what a rotation's last place can turn"


@every
@parts
def test_products_and_sums_may_be_taken_in_its_basis(method: CacheMethod, part: str) -> None:
    x, queries = vectors(64), vectors(4, seed=1)
    _, code = coded(method, part, x)
    coordinates = code.unpack(code.pack(x))
    dense = code.back(coordinates)
    torch.testing.assert_close(
        code.turned(queries) @ coordinates.mT, queries @ dense.mT, rtol=1e-3, atol=2e-3
    )
    weights = torch.rand(2, 3, 4, 64).softmax(-1)
    torch.testing.assert_close(code.back(weights @ coordinates), weights @ dense, rtol=1e-3, atol=1e-4)


LOSS = {
    "q8_0": 7.57e-05, "q5_1": 0.00229, "q5_0": 0.00477, "q4_1": 0.00971, "q4_0": 0.0193, "iq4_nl": 0.0114,
    "f16": 4.62e-08, "bf16": 3.06e-06, "f32": 1e-30, "fp8": 0.000745, "fp8-e5m2": 0.0031,
    "fp8-token": 0.000463, "int8": 5.83e-05, "int4": 0.0168, "int2": 0.501, "int4-g32": 0.00971,
    "int8-channel": 2.36e-05, "int4-channel": 0.00681, "int2-channel": 0.17, "kivi-4": 0.00681,
    "kivi-2": 0.17, "polarquant": 0.0344, "qjl": 0.494, "qjl-4": 0.24, "q8_0-rot": 2.71e-05,
    "q5_0-rot": 0.00172, "q4_0-rot": 0.00698, "int4-rot": 0.00768, "int2-rot": 0.191, "fp8-rot": 0.000753,
    "kivi-2-rot": 0.166, "turboquant-8": 4.28e-05, "turboquant-4": 0.00997, "turboquant-3": 0.0365,
    "turboquant-2": 0.124, "turboquant-1": 0.384, "turboquant-3.5": 0.0169, "turboquant-2.5": 0.0597,
    "turboquant-2.25": 0.0736, "turboquant-4-prod": 0.0584, "turboquant-4-nc": 0.00962,
    "int4-token-asym": 0.0193, "int8-token": 0.00014, "int4-g32-token-asym-clip0.95": 0.0115,
}  # fmt: skip
"""Largest squared error of keys, as a share of their squares: each a twelfth above what is measured."""


@every
def test_loss(method: CacheMethod) -> None:
    x = vectors(256)
    _, code = coded(method, "k", x)
    back = code.back(code.unpack(code.pack(x)))
    loss = float((back - x).square().sum() / x.square().sum())
    assert loss < LOSS[str(method)] and (loss > LOSS[str(method)] / 2 or str(method) == "f32"), loss


@every
@pytest.mark.parametrize("tokens", [0, 1, 31, 33, 129, 300])
def test_bytes_as_predicted_however_they_come(method: CacheMethod, tokens: int) -> None:
    for pieces in ((tokens,), (1, tokens - 1), (tokens // 2, tokens - tokens // 2)):
        store = Store(method, "k", None, None)
        for piece in pieces:
            store.append(vectors(max(piece, 0)))
        assert store.tokens == tokens or min(pieces) < 0
        assert store.bytes_ == stored_bytes(method, "k", 3, 64, store.tokens, sequences=2)


@every
def test_a_store_gives_back_what_it_decodes_to(method: CacheMethod) -> None:
    x = vectors(300)
    store = Store(method, "k", None, None)
    store.append(x)
    dense = store.dense(0, 64)
    again = torch.cat(
        [
            store.code.back(piece.coordinates) if piece.packed else piece.coordinates
            for piece in store.pieces(7, 50)
        ],
        -2,
    )
    torch.testing.assert_close(again, dense[:, :, 7:])
    store.crop(45)
    assert store.tokens == 255
    torch.testing.assert_close(store.dense(0, 1024), dense[:, :, :255], rtol=2e-3, atol=4e-3)
    store.append(x[:, :, 255:])
    assert store.dense(0, 1024).shape == dense.shape


@every
def test_no_head_of_seven(method: CacheMethod) -> None:
    why = method.refuses(7)
    if why is None:
        x = vectors(64, 7)
        _, code = coded(method, "k", x)
        assert code.back(code.unpack(code.pack(x))).shape == x.shape
    else:
        assert "head of 7" in why


@pytest.mark.parametrize(
    "text",
    ["", "int9", "int4-g0", "q4_2", "q8_0-rot-rot", "turboquant", "turboquant-9", "turboquant-8.5", "kivi",
     "turboquant-3.3", "turboquant-3-rot", "qjl-9", "f16-rot", "k=", "k=q8_0,v", "q8_0,q8_0,q8_0",
     "q8_0,window=x", "q8_0,skip=1-2", "q8_0,k=f16", "q8_0,ends=2,ends=3", "q8_0,colour=red", "x" * 1000],
)  # fmt: skip
def test_what_there_is_not(text: str) -> None:
    with pytest.raises(Refused) as refused:
        cache_choice(text)
    assert refused.value.fix


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("turboquant-3.5", "turboquant-3.5"), ("K=q8_0, V=TurboQuant-3", "k=q8_0,v=turboquant-3"),
     ("q8_0,q4_0", "k=q8_0,v=q4_0"), ("auto", "f16"), ("window=4,q4", "q4_0,window=4"),
     ("k=q4_0", "k=q4_0,v=f16"), ("int4-g64", "int4"),
     ("kivi-2,window=64,ends=2,skip=9+5+9", "kivi-2,window=64,ends=2,skip=5+9"), ("fp8_e4m3", "fp8"),
     ("turboquant-2.25-nc-seed7", "turboquant-2.25-nc-seed7"), ("int2-channel-g32", "int2-channel")],
)  # fmt: skip
def test_a_cache_in_words(text: str, canonical: str) -> None:
    assert str(cache_choice(text)) == canonical and cache_choice(canonical) == cache_choice(text)


def test_layers_that_stay() -> None:
    choice = cache_choice("q4_0,ends=2,skip=5")
    plain = [i for i in range(10) if str(choice.of(i, 10)[0]) == "f16"]
    assert plain == [0, 1, 5, 8, 9]
    with pytest.raises(Refused, match="no layer 5"):
        choice.check(4, 64, 64)
    with pytest.raises(Refused, match="blocks of 32"):
        choice.check(10, 80, 80)


def test_blocks_are_the_grids_own() -> None:
    from bitmill.numerics import blocks

    x = vectors(5)
    for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"):
        method = registry.cache_method(name)
        on_grid = registry.parse_grid(name).round(x.reshape(-1, 64))
        raw = torch.from_numpy(blocks.pack(name, on_grid.codes, on_grid.params))
        code = method.code("k", 64, {})
        packed = code.pack(x)
        assert torch.equal(packed["blocks"].reshape(-1, raw.shape[1]), raw)
        assert torch.equal(code.unpack(packed).reshape(-1, 64), on_grid.dense())
