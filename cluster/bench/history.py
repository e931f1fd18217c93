"""What clients of a head saw, in order: the evidence by which a run with faults is judged (see `verdicts`)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

What = Literal[
    "submitted",  # a Submit was answered: job, key, kind
    "attached",  # a stream was opened after token `number`
    "token",  # one token of a stream, as the head numbered it
    "progress",  # of a stream: processed, total, cached
    "state",  # the job as a stream, Get, Wait or Submit described it
    "detached",  # the stream ended: `text` is why, empty after the final job
    "cancelled",  # a Cancel was answered: state, number
    "answer",  # one answer of a job in a final state, as Get described it
    "error",  # a call was refused or broke: method in `kind`, status in `state`, details in `text`
]


@dataclass(frozen=True, slots=True)
class Seen:
    """One observation of one client. Which fields mean something depends on `what`.

    Attributes:
        at, began: seconds of one monotonic clock: when the answer came, when its call began.
        follower: number of the stream within the run; 0 for calls with one reply.
        number: of a token; of the last token for states; where a stream begins.
        tokens: of an answer.
    """

    what: What
    at: float
    client: str
    job: str = ""
    began: float = 0.0
    follower: int = 0
    key: str = ""
    kind: str = ""
    number: int = 0
    question: int = 0
    token: int = -1
    text: str = ""
    state: str = ""
    restarts: int = 0
    processed: int = 0
    total: int = 0
    cached: int = 0
    tokens: tuple[int, ...] = ()


class History:
    """A list of observations that many clients add to at a time."""

    def __init__(self, seen: Iterable[Seen] = ()) -> None:
        self._seen = list(seen)
        self._lock = threading.Lock()
        self._followers = 0

    def add(self, what: What, client: str, **values: object) -> Seen:
        """Append an observation of now."""
        entry = Seen(what, time.monotonic(), client, **values)  # type: ignore[arg-type]
        with self._lock:
            self._seen.append(entry)
        return entry

    def new_follower(self) -> int:
        """Return a number for a stream, from 1."""
        with self._lock:
            self._followers += 1
            return self._followers

    def __iter__(self) -> Iterator[Seen]:
        with self._lock:
            return iter(tuple(self._seen))

    def __len__(self) -> int:
        return len(self._seen)

    def of(self, *what: What) -> list[Seen]:
        """Return the observations of these kinds."""
        return [entry for entry in self if entry.what in what]

    def save(self, path: Path) -> None:
        """Write one JSON line an observation."""
        path.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in self), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> History:
        """Read what `save` wrote."""
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls(Seen(**row | {"tokens": tuple(row["tokens"])}) for row in rows)
