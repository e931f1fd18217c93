"""Requests that nobody should send, by the thousand: out of the OpenAPI document, and recorded ones that were damaged.

No answer may be a fault of the server, every error must be an object of the protocol, and afterwards the head serves as
before and has nothing left of them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import httpx

from cluster.bench.http.judge import Answer, exchange, problem_of
from cluster.bench.http.mutations import Damaged, damage
from cluster.bench.http.recorded import RECORDED
from cluster.bench.http.rig import cancel_all

if TYPE_CHECKING:
    from schemathesis.generation.case import Case

_PATIENCE_S, _SHORT_S = 3.0, 0.3  # for an answer; where more of the request is expected that never comes
_CANCEL_EVERY = 250  # requests, so that the queue of jobs is never full
_SHOWN = 200  # bytes of a request that is at fault


@dataclass
class Tally:
    """What came back.

    Attributes:
        left: requests whose client left before the end of the answer.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    left: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.kinds.values())

    def add(self, kind: str, path: str, answer: Answer, shown: str) -> None:
        """Count an answer, and note what is wrong about it."""
        self.kinds[kind] += 1
        self.statuses[str(answer.status or ("left" if not answer.is_whole else "closed"))] += 1
        self.left += not answer.is_whole
        if problem := problem_of(path, answer):
            self.problems.append(f"{kind}: {problem}: {shown}")

    def merge(self, row: Mapping[str, Any]) -> None:
        """Add what `as_row` has returned."""
        self.statuses.update(row["statuses"])
        self.kinds.update(row["kinds"])
        self.left += row["left"]
        self.problems += row["problems"]

    def as_row(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "requests": self.count, "statuses": dict(sorted(self.statuses.items())),
            "kinds": dict(sorted(self.kinds.items())), "left": self.left, "problems": self.problems,
        }  # fmt: skip


def send_mutations(url: str, objects: Mapping[str, str], numbers: range, seed: int) -> Tally:
    """Send damaged requests, each the same for the same seed and number."""
    tally, at = Tally(), urlsplit(url)
    recorded = [one.with_objects(objects) for one in RECORDED]
    for number in numbers:
        noise = random.Random(f"{seed} {number}")
        found = damage(noise, recorded[number % len(recorded)])
        patience = _PATIENCE_S if found.is_http else _SHORT_S
        answer = exchange(str(at.hostname), at.port or 80, found.raw, patience, half_close=not found.is_http)
        if answer.status is None and not found.is_http:
            answer = Answer(None, is_whole=False)
        tally.add(found.kind, found.path, answer, f"number {number}: {_show(found)}")
        if number % _CANCEL_EVERY == 0:
            cancel_all(url)
    return tally


def _show(found: Damaged) -> str:
    _, _, body = found.raw.partition(b"\r\n\r\n")
    return f"{found.path} {body[:_SHOWN]!r}"


def operations(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (method, path) of every operation of an OpenAPI document."""
    return [(method, path) for path, methods in document["paths"].items() for method in methods]


def schema_pieces(document: Mapping[str, Any], total: int) -> Iterator[tuple[str, str, int]]:
    """Yield (method, path, cases) for each operation; those without fields get one, as there is one such request."""
    found = operations(document)
    plain = [one for one in found if not _has_fields(document["paths"][one[1]][one[0]])]
    share, more = divmod(max(0, total - len(plain)), len(found) - len(plain))
    for method, path in found:
        if (method, path) in plain:
            yield method, path, 1
        else:
            yield method, path, share + (more > 0)
            more -= 1


def _has_fields(operation: Mapping[str, Any]) -> bool:
    return bool(operation.get("parameters")) or "requestBody" in operation


def send_cases(
    url: str, document: dict[str, Any], objects: Mapping[str, str], method: str, path: str, count: int, seed: int
) -> Tally:
    """Send requests to one operation that schemathesis makes: right ones and wrong ones in halves.

    Where the operation is about an object, every second one is about one that is there.
    """
    import hypothesis
    import schemathesis
    from hypothesis import HealthCheck, Phase
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    operation = schemathesis.openapi.from_dict(document)[path][method.upper()]
    tally = Tally()
    known = [kind for kind in objects if f"{{{kind}" in path or f"{{{kind}_id" in path]

    def run(mode: GenerationMode, most: int) -> None:
        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=most, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Case[Any]) -> None:
            if tally.count >= count:
                return
            if known and method != "delete" and tally.count % 2:
                case.path_parameters = dict.fromkeys(case.path_parameters or (), objects[known[0]])
            _send_case(url, case, f"{mode.value}", tally)

        # what has no field can only be right, and there is only one such request
        try:
            send()
        except Unsatisfiable:
            pass

    if count > 1:
        run(GenerationMode.NEGATIVE, count // 2)
    for _ in range(3):  # duplicates are not made again
        if tally.count < count:
            run(GenerationMode.POSITIVE, count - tally.count)
    cancel_all(url)
    return tally


def _send_case(url: str, case: Case[Any], mode: str, tally: Tally) -> None:
    import requests

    try:
        answer = case.call(base_url=url, timeout=_PATIENCE_S)
    except requests.exceptions.Timeout:
        found = Answer(None, is_whole=False)
    except requests.exceptions.ConnectionError as error:
        found = Answer(None, is_whole="timed out" in str(error).lower())
    else:
        kinds = answer.headers.get("content-type", [""])
        found = Answer(answer.status_code, kinds[0], answer.content)
    path = quote(case.formatted_path) if case.path_parameters else case.path
    tally.add(mode, path, found, f"{case.method} {path} {str(case.body)[:_SHOWN]}")


def read_document(url: str) -> dict[str, Any]:
    """Return the OpenAPI document of a head."""
    return dict(httpx.get(f"{url}/openapi.json", timeout=60).raise_for_status().json())


def timed(work: Callable[[], Tally]) -> dict[str, Any]:
    """Return what a piece of work found as plain data, with its seconds."""
    began = time.monotonic()
    row = work().as_row()
    return row | {"seconds": round(time.monotonic() - began, 1)}
