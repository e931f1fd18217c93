"""Frames: round trips of every type and size, and every kind of damage."""

import contextlib
import io
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.data.frames import DAMAGED, FIVE, changed, frames_of, sealed, with_wrong_checksum
from workers.transport.frames import (
    DTYPES,
    HEADER_BYTES,
    MAX_PAYLOAD,
    FrameError,
    Header,
    announce,
    read_announcement,
    read_tensor,
    split,
)


class Ended(Exception):
    """The stream of frames ended where more was due."""


def assemble(frames: list[bytes]) -> list[tuple[int, torch.Tensor]]:
    """The tensors of a stream; raises Ended if it ends inside one."""
    data = io.BytesIO(b"".join(frames))

    def fill(room: memoryview) -> None:
        if data.readinto(room) < len(room):
            raise Ended

    tensors = []
    while data.tell() < len(data.getbuffer()):
        tensors.append(read_tensor(fill))
    return tensors


def cut(tensor: torch.Tensor, step: int = 1, payload: int = MAX_PAYLOAD) -> list[bytes]:
    return list(split(tensor, step, payload))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (5, 0), (3, 7), (2, 3, 5), (1, 2, 3, 4), (67, 193)], ids=str)
def test_round_trip(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = (torch.randn(shape) * 100).to(dtype)
    for payload in (1, 13, 64, MAX_PAYLOAD):
        if tensor.numel() > 1000 and payload < 64:
            continue
        [(step, got)] = assemble(cut(tensor, 8, payload))
        assert step == 8
        assert got.dtype == dtype
        assert got.shape == tensor.shape
        assert torch.equal(got, tensor)


def test_views_and_special_values_keep_their_bits():
    wide = torch.tensor([[1.0, torch.nan], [-0.0, torch.inf], [1e-40, -torch.inf]])
    [(_, got)] = assemble(cut(wide.T))
    assert torch.equal(got.view(torch.int32), wide.T.contiguous().view(torch.int32))


def test_a_tensor_is_filled_where_it_will_be():
    """As a socket does it: each payload without a copy."""
    rooms = []
    data = io.BytesIO(b"".join(FIVE))

    def fill(room: memoryview) -> None:
        data.readinto(room)
        rooms.append(room)

    step, tensor = read_tensor(fill)
    assert (step, len(rooms)) == (5, 10)
    assert torch.equal(tensor, torch.arange(80.0))
    tensor += 1
    assert b"".join(rooms[1::2]) == tensor.numpy().tobytes()


@pytest.mark.parametrize(("payload", "count"), [(1, 40), (39, 2), (40, 1), (41, 1), (20, 2), (13, 4)])
def test_payloads_are_cut_at_their_limit(payload: int, count: int):
    frames = cut(torch.randn(10), 1, payload)
    headers = [Header.unpack(frame) for frame in frames]
    assert len(frames) == count
    assert [header.index for header in headers] == list(range(count))
    assert all(header.count == count for header in headers)
    assert all(header.size == payload for header in headers[:-1])
    assert [header.size for header in headers] == [len(frame) - HEADER_BYTES for frame in frames]
    assert len(assemble(frames)) == 1


def test_tensors_follow_each_other():
    done = assemble([frame for step in range(5) for frame in frames_of(step + 1, 8, step)])
    assert [(step, tensor.numel()) for step, tensor in done] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_headers_keep_every_value():
    header = Header(1 << 40, 3, (1 << 32) - 1, 2, (1, 2**63, 0, 2**64 - 1), 5, (1 << 32) - 1)
    assert HEADER_BYTES == len(header.pack(b"12345")) == 64
    assert Header.unpack(header.pack(b"12345")) == header


# --- epochs -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    new=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    old=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(0, 40)), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_frames_of_earlier_epochs_change_nothing(new: list[int], old: list[tuple[int, int, int]], order: Random):
    """However they are mixed: whole tensors, parts of them, frames that continue others."""
    frames = [frame for step, size in enumerate(new) for frame in split(torch.arange(float(size)), step, 16, epoch=7)]
    late = [split(torch.arange(float(size)) + 1000, step, 16, epoch) for step, epoch, size in old]
    others = [frame for tensor in late for frame in tensor]
    order.shuffle(others)
    places = sorted((order.randrange(len(frames) + 1) for _ in others), reverse=True)
    for place, frame in zip(places, others, strict=True):
        frames.insert(place, frame)
    dropped: list[int] = []
    data = io.BytesIO(b"".join(frames))
    for step, size in enumerate(new):
        got, tensor = read_tensor(data.readinto, 7, lambda: dropped.append(1))
        assert got == step
        assert torch.equal(tensor, torch.arange(float(size)))
    rest, unread = data.read(), 0
    while rest:
        rest, unread = rest[HEADER_BYTES + Header.unpack(rest).size :], unread + 1
    assert len(dropped) + unread == len(others), "each is counted"


def test_frames_of_a_later_epoch_and_damaged_ones_are_errors():
    with pytest.raises(FrameError, match=r"step 1: 4 bytes of epoch 8 in epoch 7"):
        read_tensor(io.BytesIO(next(split(torch.ones(1), 1, epoch=8))).readinto, 7)
    old = next(split(torch.ones(1), 1, epoch=6))
    with pytest.raises(FrameError, match="checksum"):
        read_tensor(io.BytesIO(old[:-1] + b"?").readinto, 7)
    with pytest.raises(FrameError, match="bytes of epoch 6"):
        read_tensor(io.BytesIO(changed(old, size=MAX_PAYLOAD + 1) + bytes(64)).readinto, 7)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="dtype: int32: links carry bfloat16, float16, float32, int64"):
        split(torch.arange(3).int(), 1)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_an_error(name: str):
    frames = DAMAGED[name]
    other = [with_wrong_checksum(frame) for frame in frames]
    for tried in [frames] if "checksum" in name else [frames, other]:
        with pytest.raises(FrameError) as caught:
            assemble(tried)
        assert len(str(caught.value)) < 300, name
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frame", [b"1", FIVE[0][:63], FIVE[0][:64], FIVE[0][:-1], sealed(FIVE[0][:-1])], ids=range(5))
def test_a_frame_cut_short_is_waited_for(frame: bytes):
    with pytest.raises(Ended):
        assemble([frame])


@pytest.mark.parametrize("frame", [FIVE[0] + b"1", sealed(FIVE[0] + b"1"), FIVE[0][1:]], ids=range(3))
def test_a_frame_of_another_length_is_an_error(frame: bytes):
    with pytest.raises(FrameError):
        assemble([frame, *FIVE[1:]])


def test_every_bit_counts():
    frame = frames_of(2)[0]
    for at in range(len(frame)):
        other = bytearray(frame)
        other[at] ^= 1 << at % 8
        with pytest.raises((FrameError, Ended)):
            assemble([bytes(other)])


SIZES = st.sampled_from([0, 1, 2, 3, 2**31, 2**63, 2**64 - 1])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda header, payload, fits: (
                changed(header.pack(payload) + payload, size=len(payload)) if fits else header.pack(payload) + payload
            ),
            st.builds(
                Header,
                step=st.integers(0, 2),
                index=st.integers(0, 3),
                count=st.integers(0, 3),
                dtype=st.integers(0, 5),
                shape=st.lists(SIZES, max_size=4).map(tuple),
                size=st.integers(0, 2**32 - 1),
            ),
            st.binary(max_size=9),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_anything_is_a_tensor_or_an_error(frames: list[bytes]):
    with contextlib.suppress(FrameError, Ended):
        done = assemble(frames)
        wanted = [header for header in map(Header.unpack, frames) if header.index == 0]
        assert [tuple(tensor.shape) for _, tensor in done] == [header.shape for header in wanted]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_noise_is_an_error(noise: bytes):
    with pytest.raises((FrameError, Ended)):
        assemble([noise, bytes(68)])
    with pytest.raises((FrameError, Ended)):
        assemble([sealed(noise + bytes(68))])


@settings(max_examples=200, deadline=None)
@given(st.permutations(range(4)), st.sampled_from([None, 0, 1, 2, 3]), st.integers(0, 127))
def test_only_the_whole_in_order_gives_a_tensor(order: list[int], damaged: int | None, byte: int):
    good = frames_of(64, 64)
    frames = [good[i] for i in order]
    if damaged is not None:
        other = bytearray(good[damaged])
        other[byte] ^= 0xFF
        frames[order.index(damaged)] = bytes(other)
    if order == [0, 1, 2, 3] and damaged is None:
        assert len(assemble(frames)) == 1
    else:
        with pytest.raises((FrameError, Ended)):
            assemble(frames)


# --- announcements ---------------------------------------------------------------------------------------------------


def announced(data: bytes, epoch: int = 0) -> tuple[Header, int]:
    """What the next announcement says, and how many frames of earlier epochs came before it."""
    stream, late = io.BytesIO(data), []

    def fill(room: memoryview) -> None:
        if stream.readinto(room) < len(room):
            raise Ended

    return read_announcement(fill, epoch, lambda: late.append(1)), len(late)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 5), (67, 193), (2**40, 0, 1)], ids=str)
def test_an_announcement_says_what_comes(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    data = announce(tensor, 2**40, 7)
    assert len(data) == HEADER_BYTES
    if 2**40 in shape:
        with pytest.raises(FrameError, match="is too large"):
            announced(data, 7)
        return
    header, late = announced(data, 7)
    assert (header.step, header.shape, DTYPES[header.dtype], header.epoch, late) == (2**40, shape, dtype, 7, 0)


def test_every_bit_of_an_announcement_counts():
    data = announce(torch.ones(3, 5), 9)
    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FrameError, Ended)):
            announced(bytes(damaged))


def test_announcements_of_earlier_epochs_are_dropped_and_counted():
    old = announce(torch.ones(3), 1, 1) + b"".join(split(torch.ones(4), 2, 8, epoch=1))
    header, late = announced(old + announce(torch.ones(3, 5), 4, 2), 2)
    assert (header.step, header.shape, late) == (4, (3, 5), 3)


def test_other_types_cannot_be_announced():
    with pytest.raises(ValueError, match="dtype: float64: links carry"):
        announce(torch.ones(1).double(), 1)
