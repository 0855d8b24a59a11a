"""Codes of 1 to 16 bits as one little-endian bit stream, with no gap between codes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_BITS = 16
_PIECE = 1 << 20
"""Octets of codes that are in work at once; their int32 copies take some 80 MB."""
ALIGNMENT = 4
"""Streams are padded with zero bytes to a multiple of this, so that a kernel can read whole 32-bit words."""


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take, padding included."""
    size = (count * bits + 7) // 8
    return -(-size // ALIGNMENT) * ALIGNMENT


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield (code, byte, shift) wherever one of 8 consecutive codes touches one of their `bits` bytes.

    A positive shift moves the code up inside the byte; a negative one drops its low bits, which lie in earlier bytes.
    """
    for code in range(8):
        first, last = bits * code // 8, (bits * code + bits - 1) // 8
        for byte in range(first, last + 1):
            yield code, byte, bits * code - 8 * byte


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return the bit stream of `codes` (any shape, any integer dtype, row-major) as uint8 [packed_size].

    Code i occupies stream bits bits * i .. bits * (i + 1) - 1; stream bit j is bit j % 8 of byte j // 8.
    Asserts that every code is in 0 .. 2**bits - 1.
    """
    assert 1 <= bits <= MAX_BITS
    flat = codes.reshape(-1)
    count = flat.numel()
    if count:
        assert int(flat.min()) >= 0 and int(flat.max()) < 1 << bits
    result = torch.zeros(packed_size(count, bits), dtype=torch.uint8, device=flat.device)
    for start, part in enumerate(torch.split(flat, 8 * _PIECE)):
        target = result[start * _PIECE * bits :]
        stream = _packed(part, bits)
        used = min(stream.numel(), target.numel())  # beyond lie the zero codes that fill the last octet
        target[:used] = stream[:used]
    return result


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes of codes [n], zero codes after them to fill the last octet: uint8 [ceil(n / 8) * bits]."""
    count = codes.numel()
    octets = torch.zeros((count + 7) // 8 * 8, dtype=torch.int32, device=codes.device)
    octets[:count] = codes
    columns = octets.view(-1, 8).t().contiguous()  # [8, n / 8]
    packed = torch.zeros(bits, columns.shape[1], dtype=torch.int32, device=codes.device)
    for code, byte, shift in _overlaps(bits):
        packed[byte] |= columns[code] << shift if shift >= 0 else columns[code] >> -shift
    return (packed & 255).to(torch.uint8).t().reshape(-1)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of a stream, uint8 [count] up to 8 bits and int32 [count] above.

    packed uint8 [packed_size(count, bits)]; the inverse of `pack_bits`.
    """
    assert 1 <= bits <= MAX_BITS and packed.dtype == torch.uint8 and packed.numel() == packed_size(count, bits)
    result = torch.empty(count, dtype=torch.uint8 if bits <= 8 else torch.int32)
    for start, part in enumerate(torch.split(result, 8 * _PIECE)):
        part.copy_(_unpacked(packed[start * _PIECE * bits :], bits, part.numel()))
    return result


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes, int32 [count], of a stream that may go on, or end inside the last octet."""
    octets = (count + 7) // 8
    stream = torch.zeros(octets * bits, dtype=torch.uint8)
    used = min(stream.numel(), packed.numel())
    stream[:used] = packed[:used]
    columns = stream.view(octets, bits).t().to(torch.int32).contiguous()  # [bits, n / 8]
    codes = torch.zeros(8, octets, dtype=torch.int32)
    for code, byte, shift in _overlaps(bits):
        codes[code] |= columns[byte] >> shift if shift >= 0 else columns[byte] << -shift
    return (codes & ((1 << bits) - 1)).t().reshape(-1)[:count]


def padding_is_zero(packed: Tensor, bits: int, count: int) -> bool:
    """Whether every bit of the stream after the last code is 0, so that equal codes have equal bytes."""
    used = count * bits
    tail = packed[used // 8 :].clone()
    if used % 8 and tail.numel():
        tail[0] = tail[0] >> (used % 8)
    return not bool(tail.any())
