"""What the proxy decides is decided without I/O: which fault strikes, where, and what is sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.network.plan import NetworkFault, mangle, next_due, pause_s, piece_bytes


@given(st.lists(st.integers(0, 200), max_size=5), st.integers(1, 100))
def test_the_next_fault_is_the_nearest_one_within_the_chunk(left: list[int], length: int) -> None:
    index, clean = next_due(left, length)
    if index is None:
        assert clean == length
        assert all(bytes_left >= length for bytes_left in left)
    else:
        assert clean == left[index] == min(left)
        assert clean < length


@given(st.integers(0, 500), st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_a_fault_strikes_at_its_byte_however_the_stream_is_chopped(
    at_byte: int, chunks: list[int]
) -> None:
    left, sent = at_byte, 0
    for chunk in chunks:
        index, clean = next_due([left], chunk)
        sent += clean
        left -= clean
        if index is not None:
            assert sent == at_byte
            return
    assert sent == sum(chunks) <= at_byte


def test_a_byte_is_inverted_or_doubled() -> None:
    assert mangle("corrupt", b"\x0fab") == b"\xf0ab"
    assert mangle("duplicate", b"abc") == b"aabc"
    assert mangle("fin", b"abc") == b"abc"


def test_a_slow_network_takes_small_pieces_and_their_time() -> None:
    assert piece_bytes(None) is None
    assert piece_bytes(2000) == 100
    assert piece_bytes(0.5) == 1
    assert pause_s(100, 2000) == pytest.approx(0.05)
    assert pause_s(100, None) == 0.0


def test_a_divert_names_its_upstream_and_nothing_else_does() -> None:
    with pytest.raises(ValueError, match="divert"):
        NetworkFault("divert", 0)
    with pytest.raises(ValueError, match="divert"):
        NetworkFault("fin", 0, upstream=("127.0.0.1", 1))
    with pytest.raises(ValueError, match="positive"):
        NetworkFault("slow", 0, bytes_per_s=0)
