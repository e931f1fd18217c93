"""Entries of a Hugging Face cache, laid out as its library does."""

from __future__ import annotations

from pathlib import Path

from tests.support.hub.stand_in import COMMIT


def cache_entry(
    cache: Path, name: str, files: dict[str, bytes], commit: str = COMMIT, branch: str | None = "main"
) -> Path:  # fmt: skip
    """Write a snapshot whose files are links to blobs; returns its folder."""
    entry = cache / f"models--{name.replace('/', '--')}"
    snapshot = entry / "snapshots" / commit
    (entry / "blobs").mkdir(parents=True, exist_ok=True)
    for number, (file, data) in enumerate(files.items()):
        blob = entry / "blobs" / f"{commit[:8]}{number}"
        blob.write_bytes(data)
        link = snapshot / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    if branch is not None:
        (entry / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (entry / "refs" / branch).write_text(commit)
    return snapshot
