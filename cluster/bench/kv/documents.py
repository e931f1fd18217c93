"""What is read again of a prompt that was given up and of a document that has grown, and what a deleted one leaves."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.bench.head_process import until
from cluster.bench.kv.rig import Asked, Bounds, DemoHead, Say, difference, follow, stored_bytes
from cluster.bench.kv.storing import prefill, token_ids
from cluster.client.client import Client, Job
from cluster.client.models import ProgressEvent
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.eval.haystack import build_haystack, read_source

GIVEN_UP_AT = 0.6  # of the time of a prefill; more of the tokens, since later ones take longer
RETRY = 0.45  # of tokens and time, that the next try computes and takes; of what was left, 0.05 more
GROWTH = 0.1  # of a document
APPENDED = 0.12  # of the longer document's tokens, that are computed
_LAYOUT = (2, 2)
_WAYS = ("cancel", "deadline", "disconnect")
_GONE_WITHIN_S = 150.0  # what a crash or a race leaves goes with one of two sweeps, a minute apart
_STAYS_GONE_S = 5.0
_QUESTION = "What is the secret code of old stone?"


def measure_documents(length: int, seed: int, folder: Path | None, say: Say) -> dict[str, Any]:
    """Give prompts up and submit them again, let a document grow, delete documents; on heads of the demo model.

    Args:
        length: tokens of prompts and documents.
        folder: on the disk to measure; default: that of temporary files.
    """
    bounds = Bounds()
    with tempfile.TemporaryDirectory(prefix="lr-kv-", dir=folder) as name:
        with DemoHead(Path(name) / "kept", _LAYOUT, int(length * (1 + 2 * GROWTH))) as head:
            retries = _retries(head, length, seed, bounds, say)
            grown = _grown(head, length, seed, bounds, say)
        with DemoHead(Path(name) / "deleted", _LAYOUT, length) as head:
            deleted = _deleted(head, length, seed, bounds, say)
    return {
        "length": length, "seed": seed, "retries": retries, "grown": grown, "deleted": deleted
    } | bounds.to_json()  # fmt: skip


# --- given up --------------------------------------------------------------------------------------------------------


def _retries(head: DemoHead, length: int, seed: int, bounds: Bounds, say: Say) -> list[dict[str, Any]]:
    """Give a prompt up in every way and submit it again."""
    rows: list[dict[str, Any]] = []
    with head.client() as client:
        prefill(client, token_ids(length, f"{seed} warm up"))
        head.settle()
        whole = prefill(client, token_ids(length, f"{seed} whole"))
        seconds = GIVEN_UP_AT * whole.first_token_s
        tokens = max((done for at, done in whole.progress if at <= seconds), default=0)
        for way in _WAYS:
            head.settle()
            ids = token_ids(length, f"{seed} {way}")
            options: dict[str, Any] = {"attached": way == "disconnect"}
            if way == "deadline":
                options["deadline_s"] = seconds
            done = _give_up(head, {"token_ids": ids, "max_tokens": 1, "temperature": 0.0} | options, way, tokens)
            again = prefill(client, ids)
            row = retry_row(way, done / length, whole, again)
            rows.append(row)
            say(f"{way} at {row['given_up_at']}: computed again {row['computed_share']}, time {row['time_share']}")
            judge_retry(bounds, row)
    return rows


def _give_up(head: DemoHead, options: dict[str, Any], way: str, tokens: int) -> int:
    """Submit a prompt and leave it when so many of its tokens are done; return how many were done then."""
    with head.client() as client, head.client() as other:
        job = client.submit(**options)
        stream, done = job.stream(), 0
        for event in stream:
            if isinstance(event, ProgressEvent):
                done = event.progress.processed
            if way != "deadline" and done >= tokens:
                break
        if way == "cancel":
            job.cancel()
        stream.close()  # type: ignore[attr-defined]  # hangs up
        ended = other.job(job.id)
        until(lambda: ended.refresh().done, "an end of the job")
        if ended.state == "succeeded":
            raise RuntimeError(f"the prompt was read before the {way}: make it longer")
        return done


def retry_row(way: str, given_up_at: float, whole: Asked, again: Asked) -> dict[str, Any]:
    """Return the figures of a second try beside those of a prompt that was read at once."""
    return {
        "way": way, "given_up_at": round(given_up_at, 3), "whole_s": round(whole.first_token_s, 3),
        "again_s": round(again.first_token_s, 3), "prompt_tokens": again.answer.prompt_tokens,
        "computed_tokens": again.computed, "computed_share": round(again.computed / again.answer.prompt_tokens, 4),
        "time_share": round(again.first_token_s / whole.first_token_s, 4),
    }  # fmt: skip


def judge_retry(bounds: Bounds, row: dict[str, Any]) -> None:
    """Note what a second try computes and takes; who gave up sooner has more left, so more is allowed."""
    allowed = round(RETRY + max(0.0, GIVEN_UP_AT - row["given_up_at"]), 4)
    bounds.at_most(f"{row['way']}: share of the tokens that the second try computes", row["computed_share"], allowed)
    bounds.at_most(f"{row['way']}: share of the time that it takes", row["time_share"], allowed)


# --- grown -----------------------------------------------------------------------------------------------------------


def _grown(head: DemoHead, length: int, seed: int, bounds: Bounds, say: Say) -> dict[str, Any]:
    """Ask about a document, append to it, ask about the longer one."""
    text, more = _text(length, seed + 1), _text(int(length * GROWTH), seed + 2)
    with head.client() as client:
        document = client.documents.add(text, max_tokens=int(length * (1 + 1.5 * GROWTH)))
        first = _ask(client, document.id)
        head.settle()
        longer = client.documents.append(document.id, more)
        second = _ask(client, longer.id)
        document, longer = client.documents.get(document.id), client.documents.get(longer.id)  # counted by now
    share = second.computed / second.answer.prompt_tokens
    say(f"grown by {longer.tokens / document.tokens - 1:.1%}: computed {share:.1%}")
    bounds.at_most("grown document: share of its tokens that are computed", share, APPENDED)
    return {
        "tokens": document.tokens, "longer_tokens": longer.tokens, "computed_tokens": second.computed,
        "first_s": round(first.first_token_s, 3), "longer_s": round(second.first_token_s, 3),
        "time_share": round(second.first_token_s / first.first_token_s, 4),
    }  # fmt: skip


def _ask(client: Client, document_id: str) -> Asked:
    document = client.documents.get(document_id)
    return follow(lambda: client.submit(document, _QUESTION, max_tokens=4, ignore_eos=True, temperature=0.0))


def _text(length: int, seed: int) -> str:
    """Return a text of about so many tokens; those of other seeds begin otherwise."""
    tokenizer, source = TextTokenizer.open(needle_dir()), read_source(needle_dir()).rotate(seed)
    return build_haystack(tokenizer, length, 1, seed, source).document


# --- deleted ---------------------------------------------------------------------------------------------------------


def _deleted(head: DemoHead, length: int, seed: int, bounds: Bounds, say: Say) -> list[dict[str, Any]]:
    """Delete a document that was read, and one whose KV is being written."""
    rows: list[dict[str, Any]] = []
    with head.client() as client:
        for when in ("when all is stored", "while it is written"):
            text = _text(length, seed + 10 + len(rows))
            document, job = client.documents.add(text, read=True)
            if when == "when all is stored":
                job.wait()
                head.settle()
            else:
                _stop_early(job, length)
            before, counts, began = stored_bytes(head.store), head.counts(), time.monotonic()
            client.documents.delete(document.id)
            row = {"when": when, "bytes_before": before} | _watch(head.store, began)
            row["blocks_written_meanwhile"] = int(difference(head.counts(), counts)["stored blocks"])
            say(f"deleted {when}: {before} bytes before, {row['bytes_left']} left after {row['gone_after_s']} s")
            bounds.equal(f"bytes of KV left of a document deleted {when}", row["bytes_left"], 0)
            rows.append(row)
    return rows


def _stop_early(job: Job, length: int) -> None:
    """Cancel a job in the middle: a document is not deleted while a job needs it."""
    for event in job.stream():
        if isinstance(event, ProgressEvent) and event.progress.processed >= GIVEN_UP_AT * length:
            break
    job.cancel()
    until(lambda: job.refresh().done, "an end of the job")


def _watch(store: Path, began: float) -> dict[str, Any]:
    """Wait until no byte is left and then whether one comes back; return the last bytes seen."""
    largest, gone = 0, None
    while (now := time.monotonic() - began) < _GONE_WITHIN_S and (gone is None or now < gone + _STAYS_GONE_S):
        left = stored_bytes(store)
        largest = max(largest, left)
        if left:
            gone = None
        elif gone is None:
            gone = now
        time.sleep(0.05)
    return {
        "bytes_left": stored_bytes(store), "most_bytes_meanwhile": largest,
        "gone_after_s": round(gone, 2) if gone is not None else None,
    }  # fmt: skip
