"""Golden words of the packed stream, as other people's files hold them."""

import pytest
import torch

from bitmill.numerics.bits import pack, packed_words, unpack


def _hex(words: torch.Tensor) -> list[str]:
    return [f"{int(w) & 0xFFFFFFFF:08X}" for w in words]


def test_gptq_four_bit_word():
    assert _hex(pack(torch.arange(8), 4)) == ["76543210"]


def test_gptq_three_bit_words_straddle_their_borders():
    assert _hex(pack(torch.arange(32) % 8, 3)) == ["88FAC688", "C688FAC6", "FAC688FA"]


def test_gptq_symmetric_zero_points_of_both_versions():
    assert _hex(pack(torch.full((8,), 7), 4)) == ["77777777"]
    assert _hex(pack(torch.full((8,), 8), 4)) == ["88888888"]


def test_compressed_tensors_word_is_offset_binary():
    assert _hex(pack(torch.arange(-8, 0) + 8, 4)) == ["76543210"]


def test_sixteen_bit_codes_are_little_endian_halves():
    assert _hex(pack(torch.tensor([0x1234, 0xFFFF, 0x0001]), 16)) == ["FFFF1234", "00000001"]
    assert unpack(pack(torch.tensor([0x1234, 0xFFFF]), 16), 16, 2).tolist() == [0x1234, 0xFFFF]


@pytest.mark.parametrize(("word", "dtype"), [(8, torch.uint8), (32, torch.int32), (64, torch.int64)])
def test_word_types(word: int, dtype: torch.dtype):
    words = pack(torch.arange(16) % 4, 2, word)
    assert words.dtype == dtype
    assert words.shape == (32 // word if word <= 32 else 1,)


def test_the_last_word_is_padded_with_zero_bits():
    assert _hex(pack(torch.full((9,), 7), 3)) == ["07FFFFFF"]
    assert packed_words(9, 3) == 1
    assert packed_words(11, 3) == 2


@pytest.mark.parametrize("bad", [[16, 0], [-1, 3]])
def test_a_code_that_does_not_fit_is_refused(bad: list[int]):
    with pytest.raises(ValueError, match="4 bits hold 0 to 15"):
        pack(torch.tensor(bad), 4)


def test_unsupported_widths_and_short_streams_are_refused():
    with pytest.raises(ValueError, match="codes are"):
        pack(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="words are"):
        pack(torch.zeros(4, dtype=torch.uint8), 4, word=12)
    with pytest.raises(ValueError, match="cannot hold"):
        unpack(torch.zeros(1, dtype=torch.int32), 3, 11)
