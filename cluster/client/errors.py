"""What both clients share: typed errors, how often to try again, the state file of a head.

Importing this loads neither grpc nor ray; `cluster.client.transport` does, when a client makes its first connection.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import UserError

if TYPE_CHECKING:
    from cluster.client.models import JobView

DEFAULT_ADDRESS = "127.0.0.1:7777"
DEFAULT_DATA_DIR = "~/.local/share/longreach"  # as in cluster.config.schema
STATE_FILE = "head.json"  # under the data directory, while a head is ready
WAY_OUT = "is a head running? start one with: longreach up CONFIG"


class LongreachError(Exception):
    """Base of every error of the clients; one line for the user."""


class InvalidRequest(LongreachError, UserError):
    """The request itself is wrong; sending it again will not help."""


class NotFound(LongreachError):
    """No such job or document."""


class Conflict(LongreachError):
    """An idempotency key used with another body, or a state that does not allow it."""


class Busy(LongreachError):
    """The queue is full; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
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

    def __init__(self, job: JobView) -> None:
        super().__init__(f"{job.id}: {job.state}" + (f": {job.error}" if job.error else ""))
        self.job = job


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff: `attempts` tries in all, the first pause up to `first_s`, doubling up to `largest_s`."""

    attempts: int = 5
    first_s: float = 0.1
    largest_s: float = 5.0

    def delays(self) -> Iterator[float]:
        """Seconds to sleep between tries, each shortened at random by up to half so that clients spread out."""
        for step in range(self.attempts - 1):
            yield min(self.largest_s, self.first_s * 2**step) * random.uniform(0.5, 1.0)


CALL_RETRIES = RetryPolicy()  # about 1 s: a caller without a head should hear so soon
REATTACH_RETRIES = RetryPolicy(attempts=14, first_s=0.2, largest_s=10.0)  # over 1 min: a head may be restarting


def read_state(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What a ready head wrote about itself: address, pid, started (seconds since 1970), ca_file, server_name.

    `ca_file` is its certificate and empty without TLS; `server_name` is a name in it when the address is none.

    Raises:
        Unavailable: no head is ready under this data directory.
    """
    path = Path(data_dir).expanduser() / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
        values = {"address": str(state["address"]), "pid": int(state["pid"]), "started": float(state["started"])}
        return values | {key: str(state.get(key, "")) for key in ("ca_file", "server_name")}
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror}): {WAY_OUT}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{path}: is not the state of a head: delete it, then: longreach up CONFIG") from error
