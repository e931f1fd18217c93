"""Judge what clients saw of a head that was disturbed: no token lost, doubled or changed, every job ended exactly once.

Each rule is a function over the whole history that yields what breaks it. Nothing here asks the head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.bench.history import History, Seen
from cluster.client.models import FINAL

Tokens = tuple[tuple[int, ...], ...]  # of a job, by question

_UNDOCUMENTED = frozenset({"UNKNOWN", "INTERNAL", "DATA_LOSS", "ABORTED", "OUT_OF_RANGE"})
_NOT_FROM_READS = frozenset({"ALREADY_EXISTS", "UNIMPLEMENTED"})
_READS = frozenset({"Get", "Stream", "Wait", "List", "ClusterStatus", "Cancel"})
_NEXT = {  # what a client may see after a state, besides the final ones; changes in between may be missed
    "": {"queued", "prefilling", "decoding", "recovering"},
    "queued": {"queued", "prefilling", "decoding", "recovering"},
    "prefilling": {"prefilling", "decoding", "recovering", "queued"},
    "decoding": {"decoding", "recovering", "prefilling", "queued"},
    "recovering": {"recovering", "prefilling", "decoding", "queued"},
}


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that was broken, by which job ("" where it is about none), and how."""

    rule: str
    job: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.job or 'no job'}: {self.text}"


@dataclass(frozen=True, slots=True)
class Expected:
    """What an undisturbed run gives, and what the faults of this run allow.

    Attributes:
        tokens: of each kind of job, by question.
        failures: parts of errors with which jobs may fail; jobs may not fail without.
        codes: status names that calls may end with besides OK.
        most_restarts: of one job; None: any number.
    """

    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    failures: Sequence[str] = ()
    codes: Collection[str] = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})
    most_restarts: int | None = None


def judge(history: History, expected: Expected) -> list[Violation]:
    """Return every violation of every rule, in the order of the rules."""
    return [Violation(rule.__name__, *found) for rule in RULES for found in rule(history, expected)]


Found = Iterator[tuple[str, str]]  # job, text


def _by_job(entries: Sequence[Seen]) -> dict[str, list[Seen]]:
    jobs: dict[str, list[Seen]] = defaultdict(list)
    for entry in entries:
        jobs[entry.job].append(entry)
    return jobs


def _by_follower(entries: Sequence[Seen]) -> dict[int, list[Seen]]:
    streams: dict[int, list[Seen]] = defaultdict(list)
    for entry in entries:
        if entry.follower:
            streams[entry.follower].append(entry)
    return streams


def accepted_jobs_end_once(history: History, expected: Expected) -> Found:
    """Every job that was answered to a Submit is seen ended, in one state, and in no other state afterwards."""
    states = _by_job(history.of("state", "cancelled"))
    for job in {entry.job for entry in history.of("submitted")}:
        final = [entry for entry in states[job] if entry.state in FINAL]
        if not final:
            last = states[job][-1].state if states[job] else "never seen again"
            yield job, f"did not end: {last}"
            continue
        ends = sorted({entry.state for entry in final})
        if len(ends) > 1:
            yield job, f"ended as {' and as '.join(ends)}"
        first = min(entry.at for entry in final)
        for entry in states[job]:
            if entry.state not in FINAL and entry.began > first:
                yield job, f"{entry.client} saw it {entry.state} after its end"


def numbers_are_consecutive(history: History, expected: Expected) -> Found:
    """From where a stream begins, its tokens have the next numbers, none left out, none twice."""
    for entries in _by_follower(history.of("attached", "token")).values():
        due = entries[0].number + 1
        for entry in entries[1:]:
            if entry.number != due:
                yield entry.job, f"{entry.client}, stream {entry.follower}: token {entry.number} where {due} was due"
            due = entry.number + 1


def followers_agree(history: History, expected: Expected) -> Found:
    """A token of a number is the same, with the same text and question, for everybody at any time."""
    for job, entries in _by_job(history.of("token")).items():
        first: dict[int, Seen] = {}
        for entry in entries:
            one = first.setdefault(entry.number, entry)
            if (one.question, one.token, one.text) != (entry.question, entry.token, entry.text):
                yield job, f"token {entry.number} was {one.token} {one.text!r}, then {entry.token} {entry.text!r}"


def streams_agree_with_get(history: History, expected: Expected) -> Found:
    """A stream that went on to the end had all that Get shows: tokens by question, and the texts together."""
    answers = _by_job(history.of("answer"))
    for entries in _by_follower(history.of("attached", "token", "detached")).values():
        job, start = entries[0].job, entries[0].number
        if entries[-1].what != "detached" or entries[-1].text or not answers[job]:
            continue
        tokens = [entry for entry in entries if entry.what == "token"]
        for answer in _newest(answers[job]):
            mine = tuple(entry.token for entry in tokens if entry.question == answer.question)
            if mine != (answer.tokens[len(answer.tokens) - len(mine) :] if start else answer.tokens):
                yield job, f"stream {entries[0].follower} after {start}: {mine[:20]}, Get: {answer.tokens[:20]}"
            text = "".join(entry.text for entry in tokens if entry.question == answer.question)
            if not start and answer.state == "succeeded" and text.strip() != answer.text.strip():
                yield job, f"stream {entries[0].follower}: text {text[:60]!r}, Get: {answer.text[:60]!r}"
        total = sum(len(answer.tokens) for answer in _newest(answers[job]))
        if start + len(tokens) != total:
            yield job, f"stream {entries[0].follower} had {start} + {len(tokens)} tokens of {total}"


def _newest(answers: Sequence[Seen]) -> list[Seen]:
    return list({answer.question: answer for answer in answers}.values())


def answers_do_not_change(history: History, expected: Expected) -> Found:
    """What Get once showed of an ended job it shows ever after."""
    for job, answers in _by_job(history.of("answer")).items():
        for question in {answer.question for answer in answers}:
            shown = {(a.tokens, a.text, a.state) for a in answers if a.question == question}
            if len(shown) > 1:
                yield job, f"question {question} has {len(shown)} different answers"


def tokens_are_as_undisturbed(history: History, expected: Expected) -> Found:
    """Jobs that succeeded have the tokens of the undisturbed run; those that ended early the first of them."""
    kinds = {entry.job: entry.kind for entry in history.of("submitted")}
    for job, answers in _by_job(history.of("answer")).items():
        reference = expected.tokens.get(kinds.get(job, ""))
        for answer in _newest(answers) if reference is not None else ():
            assert reference is not None
            right = reference[answer.question]
            if answer.tokens != (right if answer.state == "succeeded" else right[: len(answer.tokens)]):
                at = next((n for n, (a, b) in enumerate(zip(answer.tokens, right, strict=False)) if a != b), None)
                where = f"differs at {at}" if at is not None else f"has {len(answer.tokens)} of {len(right)} tokens"
                yield job, f"question {answer.question} of {kinds[job]} {where}"


def progress_goes_forward(history: History, expected: Expected) -> Found:
    """In a stream the processed tokens of a question never fall, but after a restart of the job that was shown.

    They are between the cached ones and the total, which does not change.
    """
    restarts = _by_job([entry for entry in history.of("state") if entry.state == "recovering" or entry.restarts])
    for entries in _by_follower(history.of("progress")).values():
        before: dict[int, Seen] = {}
        for entry in entries:
            if not entry.cached <= entry.processed <= entry.total:
                yield entry.job, f"progress {entry.cached} <= {entry.processed} <= {entry.total} does not hold"
            old = before.get(entry.question)
            before[entry.question] = entry
            if old is None:
                continue
            if entry.total != old.total:
                yield entry.job, f"the prompt had {old.total} tokens, then {entry.total}"
            if entry.processed < old.processed and not restarts[entry.job]:
                yield entry.job, f"progress fell from {old.processed} to {entry.processed} without recovering"


def equal_keys_are_one_job(history: History, expected: Expected) -> Found:
    """An idempotency key names one job, whoever submits it and however often."""
    jobs: dict[str, set[str]] = defaultdict(set)
    for entry in history.of("submitted"):
        if entry.key:
            jobs[entry.key].add(entry.job)
    for key, found in jobs.items():
        if len(found) > 1:
            yield min(found), f"key {key} gave {len(found)} jobs"
    for job in {entry.job for entry in history.of("submitted")}:
        keys = {entry.key for entry in history.of("submitted") if entry.job == job}
        if len(keys) > 1:
            yield job, f"it was given for the keys {sorted(keys)}"


def cancelled_jobs_stop(history: History, expected: Expected) -> Found:
    """After a Cancel was confirmed the job stays cancelled and has no further token."""
    tokens = _by_job(history.of("token", "state"))
    for entry in history.of("cancelled"):
        if entry.state not in FINAL:
            yield entry.job, f"Cancel answered {entry.state}"
        for later in tokens[entry.job]:
            if later.number > entry.number and entry.state == "cancelled":
                yield entry.job, f"{later.what} {later.number} after it was cancelled at {entry.number}"
                break


def restarts_are_shown(history: History, expected: Expected) -> Found:
    """States follow each other as documented, restarts never fall, and a job that went backwards says so."""
    for job, entries in _by_job(history.of("state")).items():
        shown = {entry.state for entry in entries}
        for client, follower in {(entry.client, entry.follower) for entry in entries}:
            state, restarts = "", 0
            for entry in (one for one in entries if (one.client, one.follower) == (client, follower)):
                if state in FINAL or entry.state in FINAL:
                    continue  # judged by accepted_jobs_end_once
                if entry.state not in _NEXT[state]:
                    yield job, f"{client} saw {entry.state} after {state}"
                went_back = state == "decoding" and entry.state in ("queued", "prefilling")
                if went_back and not entry.restarts and "recovering" not in shown:
                    yield job, f"{client} saw {entry.state} after {state}, and no restart"
                if entry.restarts < restarts:
                    yield job, f"restarts fell from {restarts} to {entry.restarts}"
                state, restarts = entry.state, entry.restarts
        most = max(entry.restarts for entry in entries)
        if expected.most_restarts is not None and most > expected.most_restarts:
            yield job, f"{most} restarts where {expected.most_restarts} are expected at most"


def failures_have_a_reason(history: History, expected: Expected) -> Found:
    """A job fails only for a reason that the faults of this run give, told in one line."""
    for entry in history.of("state"):
        if entry.state == "failed" and not any(part in entry.text for part in expected.failures):
            yield entry.job, f"failed: {entry.text or '(no reason)'}"
        if len(entry.text.splitlines()) > 1:
            yield entry.job, f"its reason has lines: {entry.text!r}"


def errors_are_documented(history: History, expected: Expected) -> Found:
    """Calls end with a code that docs/faults.md has for them, and with one line that says why."""
    for entry in history.of("error"):
        what = f"{entry.kind} of {entry.client}: {entry.state} {entry.text[:200]!r}"
        if entry.state in _UNDOCUMENTED or (entry.kind in _READS and entry.state in _NOT_FROM_READS):
            yield entry.job, f"{what}: no documented code"
        elif entry.state not in expected.codes:
            yield entry.job, f"{what}: not of this run's faults ({', '.join(sorted(expected.codes))})"
        if not entry.text or len(entry.text.splitlines()) > 1 or "Traceback" in entry.text:
            yield entry.job, f"{what}: must be one line"


RULES: tuple[Callable[[History, Expected], Found], ...] = (
    accepted_jobs_end_once,
    numbers_are_consecutive,
    followers_agree,
    streams_agree_with_get,
    answers_do_not_change,
    tokens_are_as_undisturbed,
    progress_goes_forward,
    equal_keys_are_one_job,
    cancelled_jobs_stop,
    restarts_are_shown,
    failures_have_a_reason,
    errors_are_documented,
)
