"""Messages between two processes of one node: two ends in one process."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protos.stage.channel import MAX_MESSAGE
from protos.stage.pipe import Pipe, PipeDoor

SIZES = [0, 1, 17, 67, 193, (1 << 16) - 4, 1 << 16, (1 << 16) + 1, 5 << 20, 3]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Pipe, Pipe]]:
    door = PipeDoor(str(tmp_path / "door"))
    one = Pipe.connect(door.path)
    other = door.accept(5)
    door.close()
    assert not Path(door.path).exists()
    yield one, other
    for end in (one, other):
        end.close()
        end.close()
        assert list(end.messages()) == []


def test_messages_arrive_whole_and_in_order(ends: tuple[Pipe, Pipe]):
    """Both ways at once, longer than what sockets hold."""
    messages = [random.Random(size).randbytes(size) for size in SIZES]

    def take(end: Pipe) -> list[bytes]:
        return [message for _, message in zip(SIZES, end.messages(), strict=False)]

    with ThreadPoolExecutor(2) as threads:
        taken = [threads.submit(take, end) for end in ends]
        writers = [threading.Thread(target=lambda end=end: [end.send(each) for each in messages]) for end in ends]
        for writer in writers:
            writer.start()
        assert [future.result(10) for future in taken] == [messages, messages]
        for writer in writers:
            writer.join(10)


@pytest.mark.parametrize("closed", [0, 1])  # the end that reads, the other one
def test_closing_an_end_ends_the_messages(ends: tuple[Pipe, Pipe], closed: int):
    ends[1].send(b"last")
    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(lambda: list(ends[0].messages()))
        time.sleep(0.05)
        assert not taken.done()
        ends[closed].close()
        assert taken.result(5) == [b"last"]
    with pytest.raises(OSError, match="Broken pipe"):
        ends[1 - closed].send(b"nobody reads")


def test_a_message_cut_short_is_none(ends: tuple[Pipe, Pipe]):
    ends[1]._socket.sendall(struct.pack("<I", 9) + b"12345678")
    ends[1].close()
    assert list(ends[0].messages()) == []


def test_a_length_no_message_has_is_refused(ends: tuple[Pipe, Pipe]):
    ends[1]._socket.sendall(struct.pack("<I", MAX_MESSAGE + 1))
    with pytest.raises(ValueError, match=f"a message of {MAX_MESSAGE + 1} bytes: must have at most {MAX_MESSAGE}"):
        next(ends[0].messages())


def test_descriptors_go_with_their_objects(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        door = PipeDoor(str(tmp_path / "door"))
        one = Pipe.connect(door.path)
        other = door.accept(5)
        door.close()
        one.close()
        other.close()
    del one, other
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_door_nobody_comes_to(tmp_path: Path):
    path = tmp_path / "door"
    path.write_text("left by somebody")
    door = PipeDoor(str(path))
    with pytest.raises(TimeoutError):
        door.accept(0.05)
    door.close()
    with pytest.raises(FileNotFoundError):
        Pipe.connect(door.path)
    with pytest.raises(OSError, match="too long"):
        PipeDoor(str(tmp_path / ("d" * 120)))
