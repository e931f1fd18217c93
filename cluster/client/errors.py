"""Typed errors of the clients. The message of each is one line for the user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.errors import InvalidRequest as InvalidRequest
from protos.errors import LongreachError as LongreachError

if TYPE_CHECKING:
    from cluster.client.models import BaseJob

START_HINT = "is a head running? start one with: longreach up CONFIG"


class NotFound(LongreachError):
    """No such job or document."""


class Conflict(LongreachError):
    """What is known already is used with something else, as an idempotency key, or a state does not allow it."""


class Busy(LongreachError):
    """The queue is full; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Store the seconds that the head asks to wait."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(LongreachError):
    """The API key is missing or wrong."""


class TlsError(LongreachError):
    """Plaintext met TLS, or a certificate was not accepted; sending it again will not help."""


class Unavailable(LongreachError):
    """The head cannot be reached, or did not answer in time."""


class JobFailed(LongreachError):
    """The job failed or was cancelled; `job` has what came before that."""

    def __init__(self, job: BaseJob) -> None:
        """Take state and error of the job for the message."""
        super().__init__(f"{job.id}: {job.state}" + (f": {job.error}" if job.error else ""))
        self.job = job
