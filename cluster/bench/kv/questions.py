"""First tokens of questions about one document: read for the first time, in memory, and from stored KV."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.head_process import until
from cluster.bench.kv.rig import (
    Asked,
    Bounds,
    Counts,
    DemoHead,
    Layout,
    Say,
    block_tokens,
    difference,
    disk_rate,
    follow,
    leave_page_cache,
    read_plainly,
    stored_bytes,
)
from cluster.client.client import Client
from cluster.client.models import Document
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.demo import ANSWER_TOKENS
from cluster.tools.eval.haystack import Haystack, Needle, build_haystack, is_right

WITHIN_S = 1.0  # first token of a question about a document that was read before, and is in memory,
SHARE = 0.05  # and as a share of the time of the first question
STORED: Layout = (2, 2)
OTHERS: tuple[Layout, ...] = ((1, 4), (1, 1))


@dataclass
class Questions:
    """The questions asked so far, each about another needle, so that nothing of an earlier one's end is found."""

    haystack: Haystack
    say: Say
    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    bounds: Bounds = field(default_factory=Bounds)

    def ask(
        self, head: DemoHead, document: Document, where: str, layout: Layout, loading_at: float | None = None
    ) -> None:  # fmt: skip
        """Ask the next one.

        Args:
            loading_at: rate of the disk, in bytes a second, where the KV is still to come from it.
        """
        needle = self.haystack.needles[len(self.rows)]
        before = head.counts()
        with head.client() as client:
            asked = follow(lambda: client.submit(document, needle.question, max_tokens=ANSWER_TOKENS, temperature=0.0))
        row = question_row(asked, difference(head.counts(), before), needle)
        row = {"where": where, "layout": f"{layout[0]} x {layout[1]}"} | row
        self.say(f"{where}, {row['layout']}: first token after {asked.first_token_s:.2f} s, {asked.computed} computed")
        if self.rows:
            self._judge(f"{where}, {row['layout']}", row, loading_at)
        self.rows.append(row)
        self.answers.append(asked.answer.token_ids)

    def ask_loaded(self, head: DemoHead, document: Document, where: str, layout: Layout) -> None:
        """Ask the next one once a head that has just started, or imported, has loaded what is stored."""
        loaded = head.settle()
        with head.client() as client:
            until(lambda: client.status().kv_usage == 0, "an end of loading")
        self.ask(head, document, where, layout)
        self.rows[-1] |= {
            "loaded_before_mb": round(loaded["loaded bytes"] / 1e6, 2),
            "loaded_before_s": round(loaded["loaded seconds"], 3),
        }

    def _judge(self, where: str, row: dict[str, Any], loading_at: float | None) -> None:
        first, seconds = self.rows[0]["first_token_s"], row["first_token_s"]
        row["share_of_first"] = round(seconds / first, 4)
        if loading_at is None:
            self.bounds.at_most(f"{where}: first token, s", seconds, WITHIN_S)
            self.bounds.at_most(f"{where}: share of the first question's time", seconds / first, SHARE)
        else:
            row["disk_mb_per_s"] = round(loading_at / 1e6, 1)
            size = min(row["loaded_mb"], self.rows[0]["stored_mb"]) * 1e6  # shards may read the same head
            allowed = round(size / loading_at + 1, 3)
            self.bounds.at_most(f"{where}: first token, s, beside bytes over disk rate and 1 s", seconds, allowed)


def question_row(asked: Asked, counts: Counts, needle: Needle) -> dict[str, Any]:
    """Return the figures of a question, from what the client saw and what the head counted meanwhile."""
    answer, loaded = asked.answer, int(counts.get("loaded blocks", 0)) * block_tokens()
    size, seconds = counts.get("loaded bytes", 0.0), counts.get("loaded seconds", 0.0)
    return {
        "first_token_s": round(asked.first_token_s, 3), "total_s": round(asked.total_s, 3),
        "prompt_tokens": answer.prompt_tokens, "cached_tokens": answer.cached_tokens, "computed_tokens": asked.computed,
        "from_store_tokens": min(loaded, answer.cached_tokens),
        "from_memory_tokens": max(0, answer.cached_tokens - loaded),
        "loaded_mb": round(size / 1e6, 2), "load_s": round(seconds, 3),
        "load_mb_per_s": round(size / 1e6 / seconds, 1) if seconds else None,
        "right": is_right(answer.text, needle),
    }  # fmt: skip


def measure_questions(
    length: int, dtype: str, seed: int, keep_page_cache: bool, folder: Path | None, say: Say
) -> dict[str, Any]:  # fmt: skip
    """Ask about one document of the demo model: first, again, after `down` and `up`, in other layouts, elsewhere.

    A head loads stored documents after its start; all questions but one wait for that.

    Args:
        length: tokens of the document with a question.
        dtype: of weights, computation and KV; in float32 the tokens must be those that computed KV gives.
        keep_page_cache: of the files that were just written; otherwise they leave it before every start.
        folder: on the disk to measure; default: that of temporary files.
    """
    tokenizer = TextTokenizer.open(needle_dir())
    haystack = build_haystack(tokenizer, length, 5 + len(OTHERS), seed, needle_dir())
    questions = Questions(haystack, say)
    with tempfile.TemporaryDirectory(prefix="lr-kv-", dir=folder) as name:
        root = Path(name)
        _ask_all(questions, root, length, dtype, keep_page_cache)
        with DemoHead(root / "computed", STORED, length, dtype, is_storing=False) as head, head.client() as client:
            reference = _reference(client, haystack)
    same = [mine == theirs for mine, theirs in zip(questions.answers, reference, strict=True)]
    for row, is_same in zip(questions.rows, same, strict=True):
        row["same_tokens"] = is_same
    if dtype == "float32":
        questions.bounds.equal("answers with the tokens that computed KV gives", sum(same), len(same))
    return {
        "length": length, "dtype": dtype, "seed": seed, "questions": questions.rows,
        "compared": "tokens of all answers, with those of one job without stored KV on 2 x 2"
        + ("" if dtype == "float32" else "; in bfloat16 layouts and chunks may change them: no bound"),
        "page_cache": "stored files had just been written and were left in it" if keep_page_cache
        else "stored files were written back and dropped from it (POSIX_FADV_DONTNEED) before every start",
    } | questions.bounds.to_json()  # fmt: skip


def _ask_all(questions: Questions, root: Path, length: int, dtype: str, keep_page_cache: bool) -> None:
    """Ask on all heads but the reference."""
    archive = root / "document.longreach"
    head = DemoHead(root / "first", STORED, length, dtype)
    with head, head.client() as client:
        document = client.documents.add(questions.haystack.document)
        questions.ask(head, document, "first", STORED)
        counts = head.settle()
        questions.ask(head, document, "second", STORED)
        head.settle()
        questions.rows[0] |= {
            "stored_mb": round(counts["stored bytes"] / 1e6, 2), "store_s": round(counts["stored seconds"], 3),
            "not_stored_blocks": int(counts["not_stored blocks"]),
        }  # fmt: skip
    rate = disk_rate(head.store)
    prepare = read_plainly if keep_page_cache else leave_page_cache
    prepare(head.store)
    questions.say(f"{stored_bytes(head.store) / 1e6:.0f} MB are stored, plain reads: {rate / 1e6:.0f} MB/s")
    with head:
        questions.ask(head, document, "at once after down and up", STORED, rate)
    prepare(head.store)
    with head:
        questions.ask_loaded(head, document, "after down and up", STORED)
    for number, layout in enumerate(OTHERS):
        prepare(head.store)
        with DemoHead(root / f"other {number}", layout, length, dtype, data=head.data) as other:
            questions.ask_loaded(other, document, "in another layout", layout)
            if number == len(OTHERS) - 1:
                with other.client() as client:
                    client.documents.export(document.id, archive)
    with DemoHead(root / "import", OTHERS[0], length, dtype) as elsewhere:
        with elsewhere.client() as client:
            imported = client.documents.import_(archive)
        questions.ask_loaded(elsewhere, imported, "after export and import", OTHERS[0])


def _reference(client: Client, haystack: Haystack) -> Sequence[tuple[int, ...]]:
    """Return the tokens of all answers from KV that is computed now."""
    document = client.documents.add(haystack.document)
    asked = [needle.question for needle in haystack.needles]
    return [
        answer.token_ids for answer in client.submit(document, asked, max_tokens=ANSWER_TOKENS, temperature=0.0).result
    ]
