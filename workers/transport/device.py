"""Links whose tensors go from device to device: over NCCL between two GPUs, over gloo where a CPU runs the same code.

An ordinary link (`link.py`) stands beside each of them and announces every tensor: its step, shape, type and epoch,
with a checksum. The receiver makes room for what is announced and posts the receive, on a stream of its own, while the
step before computes; at most `DEPTH` are posted and not yet taken, and as many sent and not yet received, so a receiver
that is behind makes `send` wait. Step, shape and type are compared with what is due as on every link. The bytes
themselves have no checksum of ours: NCCL and gloo carry them over PCIe, NVLink or TCP, which have their own.

Who dies is noticed by the other end's control link at once, and by gloo; who is late, at `timeout_s`. On a GPU a
receive is only queued when `take` returns: the step waits for it on the device. If the link breaks meanwhile, its group
is aborted so that the device goes on, and `check`, which comes before anything of the step is used, raises.
"""

from __future__ import annotations

import contextlib
import datetime
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from workers.transport.completion import poll
from workers.transport.frames import DTYPES, Header
from workers.transport.groups import abort, make_group
from workers.transport.link import DEPTH, Inbox, LinkClosed, Sender, check_due

_LEAVE_S = 1.0  # for the thread of a link that was closed


class Transfer:
    """A tensor on its way."""

    def __init__(self, tensor: torch.Tensor, timeout_s: float, work: Any, done: torch.cuda.Event | None) -> None:
        """Args: `done` is recorded behind the transfer on a GPU; on a CPU `work` waits for it; neither: it has come."""
        self._tensor = tensor
        self._timeout_s = timeout_s
        self._work = work
        self._done = done

    def settle(self) -> None:
        """Wait until the device knows what to wait for; on a CPU until the bytes are there. Raises RuntimeError."""
        if self._done is None and self._work is not None:
            self._work.wait(datetime.timedelta(seconds=self._timeout_s))

    def finish(self, check: Callable[[], object] = lambda: None) -> None:
        """Wait until the bytes have left or come. Raises RuntimeError: they have not; also what `check` raises."""
        self.settle()
        if self._done is not None:
            poll(self._done.query, self._timeout_s, check)

    def use(self) -> torch.Tensor:
        """Return the tensor, which the current stream waits for."""
        if self._done is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._done)
            self._tensor.record_stream(stream)
        return self._tensor


class Pair:
    """The two processes of a link as a process group, with a stream of its own on a GPU."""

    def __init__(
        self, store: dist.Store, rank: int, device: torch.device, meeting_s: float, timeout_s: float
    ) -> None:  # fmt: skip
        """Meet the other process.

        Args:
            store: rendezvous of both, fresh for every epoch.
            rank: 0 sends, 1 receives.
            meeting_s, timeout_s: limits in seconds for the meeting, and for every transfer.

        Raises:
            LinkClosed: the other one did not come, or the two cannot be connected.
        """
        self.device = device
        self._peer = 1 - rank
        self._timeout_s = meeting_s
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._closing = threading.Lock()
        self._group: Any = None
        try:
            self._group = make_group(store, rank, 2, device, meeting_s)
            # NCCL connects its members with the first transfer: now, and not in the first step.
            first = self.send(torch.zeros(1, device=device)) if rank == 0 else self.receive((1,), torch.float32)
            first.finish()
            self._timeout_s = timeout_s
        except RuntimeError as error:
            self.close()
            raise LinkClosed(f"the two ends of a link did not meet: {error}") from error

    def use_on_this_thread(self) -> None:
        """Make the device that of the calling thread: its first one is GPU 0, on which it would leave memory."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def send(self, tensor: torch.Tensor) -> Transfer:
        """Begin to send a tensor of this device, which must not change any more. Raises RuntimeError: not possible."""
        tensor = tensor.contiguous()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._begin(tensor, lambda group: group.send([tensor], self._peer, 0))

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> Transfer:
        """Begin to receive a tensor. Raises RuntimeError: not possible."""
        with self._on_stream():  # whose memory it is, so that nothing has to be waited for
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return self._begin(tensor, lambda group: group.recv([tensor], self._peer, 0))

    def close(self) -> None:
        """Break the group, so that neither end waits; called from any thread, may be called twice."""
        with self._closing:
            group, self._group = self._group, None
        if group is not None:
            abort(group, self.device)

    def _begin(self, tensor: torch.Tensor, call: Callable[[Any], Any]) -> Transfer:
        group = self._group
        if group is None:
            raise LinkClosed("the link was closed")
        if not tensor.numel():
            return Transfer(tensor, self._timeout_s, None, None)
        with self._on_stream():
            work = call(group)
            if self._stream is None:
                return Transfer(tensor, self._timeout_s, work, None)
            work.wait()  # has the stream wait, not this thread
            return Transfer(tensor, self._timeout_s, work, self._stream.record_event())

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class DeviceSender:
    """The sending end, with the methods of `Sender`."""

    def __init__(self, control: Sender, pair: Pair, timeout_s: float, depth: int = DEPTH) -> None:
        """Args: `control` announces; `timeout_s` limits the wait for room."""
        self._control = control
        self._pair = pair
        self._timeout_s = timeout_s
        self._depth = depth
        self._reason = ""
        self._room = threading.Semaphore(depth)
        self._under_way: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._finish, name="device link", daemon=True)
        self._thread.start()

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """Begin to send the tensor of a step, which must not change any more; waits while the link is full.

        Raises:
            LinkClosed: the receiver is gone, or took nothing in time. ValueError: links do not carry such tensors.
        """
        if tensor.device.type != self._pair.device.type:
            raise ValueError(f"device: {tensor.device}: this link carries tensors of {self._pair.device}")
        has_room = self._room.acquire(timeout=self._timeout_s)
        if self._reason or not has_room:
            self.close(f"the next stage took nothing within {self._timeout_s:g} s")
            raise LinkClosed(self._reason)
        try:
            self._control.announce(step, tensor)
            self._under_way.put(self._pair.send(tensor))
        except RuntimeError as error:
            self.close(str(error))
            raise LinkClosed(self._reason) from error

    def close(self, reason: str = "closed") -> None:
        """Stop, and wake who waits for room; may be called twice, the first reason stays."""
        self._reason = self._reason or reason
        self._control.close(reason)
        self._pair.close()
        self._room.release(self._depth)
        self._under_way.put(None)
        _leave(self._thread)

    def _finish(self) -> None:
        """Make room when a transfer has ended."""
        for transfer in iter(self._under_way.get, None):
            try:
                transfer.finish(self._check_open)
            except RuntimeError as error:
                self.close(f"link to the next stage broke: {error}")
            self._room.release()

    def _check_open(self) -> None:
        if self._reason:
            raise LinkClosed(self._reason)


class DeviceInbox:
    """The receiving end, with the methods of `Inbox`; the control link comes in at `inbox`."""

    def __init__(self, inbox: Inbox, pair: Pair, content: str = "activations", depth: int = DEPTH) -> None:
        self._inbox = inbox
        self._pair = pair
        self._content = content
        self._depth = depth
        self._reason = ""
        self._room = threading.Semaphore(depth)
        self._posted: queue.SimpleQueue[tuple[Header, Transfer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._post, name="device link", daemon=True)
        self._thread.start()

    @property
    def entry(self) -> object:
        """See `Inbox`."""
        return self._inbox.entry

    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor of a step, which must have this shape and type; on a GPU it may still be on its way.

        Raises:
            LinkClosed: the sender is gone, nothing came in time, or something else came.
        """
        try:
            posted = self._posted.get(timeout=timeout_s)
        except queue.Empty as error:
            raise LinkClosed(f"{self._content} of step {step} did not come within {timeout_s:g} s") from error
        if posted is None:
            self._posted.put(None)  # for whoever asks next
            raise LinkClosed(self._reason)
        self._room.release()
        header, transfer = posted
        check_due(self._content, (step, shape, dtype), (header.step, header.shape, DTYPES[header.dtype]))
        return transfer.use()

    def check(self) -> None:
        """Raise LinkClosed if what `take` returned may not have come, because the link broke before the device had it.

        On a CPU it has come when `take` returns.
        """
        if self._reason and self._pair.device.type == "cuda":
            raise LinkClosed(self._reason)

    def feed(self, pieces: Iterable[bytes]) -> tuple[str, bool]:
        """See `Inbox`."""
        return self._inbox.feed(pieces)

    def close(self, reason: str = "closed") -> None:
        """End the link and wake who waits at it; may be called twice, the first reason stays."""
        self._reason = self._reason or reason
        self._pair.close()
        self._room.release(self._depth)
        self._inbox.close(reason)
        self._posted.put(None)
        _leave(self._thread)

    def _post(self) -> None:
        """Post a receive for every announcement."""
        try:
            self._pair.use_on_this_thread()
            while not self._reason:
                header = self._inbox.take_announcement()
                self._room.acquire()
                transfer = self._pair.receive(header.shape, DTYPES[header.dtype])
                transfer.settle()
                self._posted.put((header, transfer))
        except LinkClosed as error:
            self.close(str(error))
        except Exception as error:  # noqa: BLE001 - memory too, whatever it is, the step must learn of it
            self.close(f"{self._content}: {error}")


def _leave(thread: threading.Thread) -> None:
    """Wait a moment until a thread of a closed link has ended: at the end of a process it must not be inside torch."""
    if thread is not threading.current_thread():
        thread.join(_LEAVE_S)
