"""CRC-32C: the published vectors, and the table against the processor's instruction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkgindex._core import crc32c, crc32c_by_table

#: RFC 3720, appendix B.4, and the usual check value of the nine digits.
VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
]


@pytest.mark.parametrize("compute", [crc32c, crc32c_by_table])
@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_the_published_vectors_come_out(compute, data: bytes, expected: int) -> None:
    assert compute(data) == expected


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_table_and_instruction_agree(data: bytes, start: int) -> None:
    assert crc32c(data, start) == crc32c_by_table(data, start)


@given(st.binary(max_size=100), st.integers(0, 100))
def test_a_checksum_continues_another(data: bytes, cut: int) -> None:
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


def test_any_buffer_is_taken_from_wherever_it_begins() -> None:
    data = bytes(range(256)) * 3
    for start in range(9):
        assert crc32c(memoryview(data)[start:]) == crc32c_by_table(bytearray(data[start:]))
