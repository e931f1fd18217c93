"""The head of two stages of two shards is killed while jobs prefill, decode and wait."""

from __future__ import annotations

from pathlib import Path

from cluster.tools.eval.haystack import is_right
from tests.support.rigs.head import HeadProcess, tokens_of, until
from tests.support.rigs.head_jobs import DECODES, long_document, submit


def test_five_jobs_survive_the_head_of_two_stages_of_two_shards(tmp_path: Path) -> None:
    haystack = long_document()
    with HeadProcess(tmp_path, stages=2, shards=2) as head, head.client() as client:
        jobs = [submit(client, number, haystack) for number in range(2)]
        until(lambda: jobs[1].refresh().data.last_event >= 5, "a decoding job")
        jobs += [submit(client, number, haystack) for number in range(2, 5)]
        assert [job.refresh().state for job in jobs] == ["prefilling", "decoding", *["queued"] * 3]
        assert len(head.actors()) == 4
        head.kill()
        head.start()
        assert len(head.actors()) == 4
        found = [tokens_of(job) for job in jobs]
        assert all(is_right(a.text, n) for a, n in zip(jobs[0].answers, haystack.needles, strict=True))
        assert [len(answer) for answer in found[1]] == [DECODES]
        assert [job.data.restarts for job in jobs][:2] == [1, 1]
        undisturbed = [submit(client, number, haystack) for number in range(5)]
        assert [tokens_of(job) for job in undisturbed] == found
        assert [job.data.restarts for job in undisturbed] == [0] * 5
