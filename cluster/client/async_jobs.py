"""Jobs of a head for asyncio, and the calls under everything that talks to one."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from cluster.client.connection import Connection
from cluster.client.errors import Busy, NotFound, Unavailable
from cluster.client.models import BaseJob, Event, JobData, JobEnded, StreamCursor
from cluster.client.retry import REATTACH_RETRIES, RetryPolicy
from protos.jobs import jobs_pb2 as pb
from protos.jobs import validate
from protos.jobs.convert import read_message
from protos.jobs.limits import MAX_INT64

if TYPE_CHECKING:
    from cluster.client.transport import Transport

_EARLY_PAUSE_S = 0.5  # after a wait that the head ended before its time
_WAIT_PIECE_S = 30.0  # a long wait is many calls, so that a vanished head is noticed


class AsyncCalls:
    """Calls to the head, tried again while it cannot be reached; the first one opens the connection.

    gRPC's own retry policy would not do: it ends after 5 attempts, does not repeat an upload larger than its buffer,
    and hides that a Delete which finds nothing is a second try.
    """

    def __init__(self, connection: Connection, retries: RetryPolicy) -> None:
        self._connection = connection
        self._retries = retries
        self._transport: Transport | None = None

    async def call(self, method: str, request: Any, extra_s: float = 0.0) -> Any:
        """Make a call with one reply. Raises LongreachError.

        Args:
            request: a message, or for an upload a function that begins its messages anew for each try.
            extra_s: the time the head is asked to take.
        """
        transport = self._open()
        for tries, delay in enumerate((*self._retries.delays(), None)):
            try:
                reply = await transport.call(method, request() if callable(request) else request, extra_s)
            except transport.RpcError as error:
                if delay is None or not transport.is_transient(error):
                    problem = transport.typed_error(error)
                    if tries and method.startswith("Delete") and isinstance(problem, NotFound):
                        return pb.Empty()  # deleted by an earlier try whose reply was lost
                    raise problem from error
            else:
                transport.has_answered = True
                return reply
            await asyncio.sleep(delay)
        raise AssertionError("the last try returns or raises")

    async def stream(self, method: str, request: Any) -> AsyncIterator[Any]:
        """Yield messages until the connection drops (Unavailable) or the head ends the stream."""
        transport = self._open()
        call = transport.stream(method, request)
        try:
            async for message in call:
                yield message
        except transport.RpcError as error:
            raise transport.typed_error(error) from error
        finally:
            call.cancel()

    def delays(self) -> Iterator[float]:
        """Yield the pauses between tries."""
        return self._retries.delays()

    async def close(self) -> None:
        """Close the connection; the next call opens another one."""
        if self._transport is not None:
            await self._transport.close()
            self._transport = None

    def _open(self) -> Transport:
        from cluster.client.transport import Transport

        if self._transport is None:
            self._transport = Transport(self._connection, is_async=True)
        return self._transport


class AsyncJob(BaseJob):
    """A job of the head; its properties are as of the last call.

    The job does not need this object: it survives clients and heads. `client.job(id)` finds it again.

    >>> job = await client.submit("... a long document ...", "What was decided?")
    >>> async for event in job.stream():
    ...     print(event)
    """

    def __init__(self, calls: AsyncCalls, data: JobData, many: bool | None = None) -> None:
        super().__init__(data, many)
        self._calls = calls

    async def refresh(self) -> AsyncJob:
        """Ask for the newest state; return this job. Raises NotFound when it was deleted or has expired.

        >>> (await job.refresh()).progress
        """
        return self._take(await self._calls.call("Get", pb.JobRequest(id=self.id)))

    async def wait(self, timeout_s: float | None = None) -> AsyncJob:
        """Wait until the job has ended or `timeout_s` seconds have passed; return this job, whose `done` tells which.

        A job that fails raises nothing here. A head that restarts meanwhile is waited for, over a minute.

        >>> if not (await job.wait(60)).done:
        ...     print(job.progress)
        """
        if timeout_s is not None:
            timeout_s = validate.check_number("timeout_s", timeout_s, 0.0, math.inf)
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        cursor, is_first = StreamCursor(), True  # only for its patience while a head restarts
        while not self.done:
            began = time.monotonic()
            left = min(_WAIT_PIECE_S, max(0.0, end - began))
            try:
                self._take(await self._calls.call("Wait", pb.WaitRequest(id=self.id, timeout_s=left), extra_s=left))
                cursor, is_first = StreamCursor(), False
                if not self.done and time.monotonic() - began < left / 2:  # the head is about to stop
                    await asyncio.sleep(min(_EARLY_PAUSE_S, left))
            except (Busy, Unavailable) as error:
                if is_first and isinstance(error, Busy):
                    raise
                pause = cursor.pause(error)
                if time.monotonic() + pause >= end:
                    raise
                await asyncio.sleep(pause)
            if time.monotonic() >= end:
                break
        return self

    # sync: @property
    async def result(self) -> Any:
        """Wait for the end; return the Answer, or a list of them when a list of questions was asked.

        Raises:
            JobFailed: the job failed or was cancelled.

        >>> job = await client.submit("... a document ...", "What was decided?")
        >>> (await job.result()).text
        """
        await self.wait()
        if self.data.last_event and not any(answer.token_ids for answer in self.data.answers):
            await self.refresh()  # known from a listing, which leaves tokens out
        return self._result()

    async def stream(self, after: int = 0, retries: RetryPolicy = REATTACH_RETRIES) -> AsyncIterator[Event]:
        """Yield progress and tokens as they come, then JobEnded; begin after token number `after`.

        When the connection drops, or the head ends a stream that nobody reads or that others need the place of, it
        attaches again by itself after the last token: none is lost or repeated.

        Raises:
            InvalidRequest: `after` is no token of the job.
            Busy: the head has too many streams.
            Unavailable: the head did not come back within `retries`, over a minute if not given.

        >>> async for event in job.stream():
        ...     if isinstance(event, TokenEvent):
        ...         print(event.token.text, end="")
        """
        cursor, is_first = StreamCursor(validate.check_integer("after", after, 0, MAX_INT64), retries), True
        while True:
            messages = self._calls.stream("Stream", pb.StreamRequest(id=self.id, after=cursor.after, grouped=True))
            try:
                async for message in messages:
                    is_first = False
                    for event in cursor.events(message):
                        yield event
                    if message.HasField("job") and self._take(message.job).done:
                        yield JobEnded(self.data)
                        return
                raise Unavailable(f"{self.id}: the head ended the stream before the job")
            except (Busy, Unavailable) as error:
                if is_first and isinstance(error, Busy):
                    raise
                delay = cursor.pause(error)
            finally:
                await messages.aclose()  # type: ignore[attr-defined]  # cancels the call
            await asyncio.sleep(delay)

    async def cancel(self) -> AsyncJob:
        """Cancel the job; one that has ended stays as it is. Return this job.

        >>> (await job.cancel()).state
        """
        return self._take(await self._calls.call("Cancel", pb.JobRequest(id=self.id)))

    async def delete(self) -> None:
        """Forget the ended job with its results. Raises Conflict while it runs."""
        await self._calls.call("Delete", pb.JobRequest(id=self.id))

    def _take(self, message: pb.Job) -> AsyncJob:
        self.data = read_message(JobData, message)
        return self
