"""Bit streams: known bytes, every width, padding."""

from __future__ import annotations

import pytest
import torch

from rwkvq.formats import bitpack
from rwkvq.formats.bitpack import pack_bits, packed_size, padding_is_zero, unpack_bits


def test_three_bit_codes_follow_each_other_without_gaps() -> None:
    # 1 + 2*8 + 3*64 + 7*512 = 0b111_011_010_001 = 3793 = 0x0ed1
    packed = pack_bits(torch.tensor([1, 2, 3, 7]), 3)
    assert packed.tolist() == [0xD1, 0x0E, 0, 0]


def test_codes_wider_than_a_byte_are_little_endian() -> None:
    assert pack_bits(torch.tensor([0x1234, 0xABCD]), 16).tolist() == [0x34, 0x12, 0xCD, 0xAB]
    assert pack_bits(torch.tensor([0xFFF, 0x001]), 12).tolist() == [0xFF, 0x1F, 0x00, 0x00]


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 100])
def test_streams_agree_with_one_large_integer(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(bits + 100 * count))
    packed = pack_bits(codes, bits)
    whole = sum(code << (bits * index) for index, code in enumerate(codes.tolist()))
    assert int.from_bytes(bytes(packed.tolist()), "little") == whole
    assert packed.numel() == packed_size(count, bits) and packed.numel() % 4 == 0
    assert unpack_bits(packed, bits, count).tolist() == codes.tolist()
    assert padding_is_zero(packed, bits, count)


@pytest.mark.parametrize("bits", [1, 3, 8, 13])
@pytest.mark.parametrize("count", [15, 16, 17, 100])
def test_pieces_give_the_same_stream(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(bits + 100 * count))
    whole = pack_bits(codes, bits)
    monkeypatch.setattr(bitpack, "_PIECE", 2)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert unpack_bits(whole, bits, count).tolist() == codes.tolist()


def test_three_bit_codes_take_three_eighths_of_a_byte() -> None:
    assert packed_size(1024 * 256, 3) == 1024 * 256 * 3 // 8


def test_a_bit_after_the_last_code_is_seen() -> None:
    packed = pack_bits(torch.tensor([1, 2, 3]), 3)
    for byte, value in ((1, 2), (1, 128), (3, 1)):  # stream bits 9, 15, 24
        changed = packed.clone()
        changed[byte] |= value
        assert not padding_is_zero(changed, 3, 3)
    inside = packed.clone()
    inside[1] |= 1  # stream bit 8, the last bit of the last code
    assert padding_is_zero(inside, 3, 3)
