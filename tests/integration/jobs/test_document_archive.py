"""A document is read by four processes, and moves with its KV to a head of one."""

from __future__ import annotations

from pathlib import Path

from tests.support.rigs.head import LONG, HeadProcess, tokens_of, until

TEXT = "\n".join(f"The code of river {number} is {number * number}." for number in range(300))
QUESTION = "What is the code of river 7?"


def test_read_on_one_head_and_asked_on_another(tmp_path: Path) -> None:
    path = tmp_path / "rivers.longreach"
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    with HeadProcess(tmp_path / "large", stages=2, shards=2) as head, head.client() as client:
        document = client.documents.add(TEXT, name="rivers")
        job = client.submit(document, QUESTION, max_tokens=12, ignore_eos=True)
        expected = tokens_of(job)
        blocks = job.answers[0].prompt_tokens // 512
        assert blocks >= 4
        until(lambda: client.documents.get(document.id).stored_tokens >= 512 * (blocks - 1), "stored KV")
        until(lambda: len(stored_keys(head)) == blocks, "all blocks")
        client.documents.export(document.id, path)
        stored = client.documents.get(document.id)
    with HeadProcess(tmp_path / "small") as head, head.client() as client:
        imported = client.documents.import_(path)
        assert (imported.id, imported.tokens, imported.name) == (document.id, stored.tokens, "rivers")
        assert imported.stored_tokens == stored.stored_tokens
        assert imported.kernel_family == ""
        job = client.submit(imported, QUESTION, max_tokens=12, ignore_eos=True)
        assert tokens_of(job) == expected
        assert job.answers[0].cached_tokens >= 512 * blocks, "loaded ahead, with the end of the document"
        client.documents.delete(imported.id)
        until(lambda: not stored_keys(head), "no byte of KV is left", LONG)


def stored_keys(head: HeadProcess) -> set[str]:
    """Return the keys of the blocks in the store of a head."""
    return {file.parent.name for file in (head.data / "kv").rglob("*.safetensors")}
