"""Packing equals arithmetic on one big integer, and unpacking undoes it, for every width and length."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmill.numerics.bits import pack, packed_words, unpack

widths = st.sampled_from([*range(1, 9), 16])
word_widths = st.sampled_from([8, 16, 32, 64])


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, torch.Tensor]:
    bits, word = draw(widths), draw(word_widths)
    rows, n = draw(st.integers(0, 3)), draw(st.integers(0, 70))
    seed = draw(st.integers(0, 2**31))
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    return bits, word, codes


@settings(max_examples=300, deadline=None)
@given(streams())
def test_words_are_the_digits_of_one_big_integer(case: tuple[int, int, torch.Tensor]):
    bits, word, codes = case
    words = pack(codes, bits, word)
    assert words.shape == (codes.shape[0], packed_words(codes.shape[1], bits, word))
    for row, got in zip(codes.tolist(), words.tolist(), strict=True):
        whole = sum(code << (i * bits) for i, code in enumerate(row))
        assert [w % 2**word for w in got] == [(whole >> (word * k)) % 2**word for k in range(len(got))]


@settings(max_examples=300, deadline=None)
@given(streams())
def test_unpack_undoes_pack(case: tuple[int, int, torch.Tensor]):
    bits, word, codes = case
    back = unpack(pack(codes, bits, word), bits, codes.shape[1])
    assert back.dtype == (torch.int32 if bits == 16 else torch.uint8)
    assert torch.equal(back.to(torch.int64), codes)


@settings(max_examples=50, deadline=None)
@given(streams())
def test_memory_layout_does_not_matter(case: tuple[int, int, torch.Tensor]):
    bits, word, codes = case
    spread = torch.zeros(codes.shape[0], codes.shape[1], 2, dtype=codes.dtype)
    spread[..., 1] = codes
    assert torch.equal(pack(spread[..., 1], bits, word), pack(codes, bits, word))
