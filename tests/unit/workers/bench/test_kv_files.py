"""Stored KV is written and read at rates that the command prints beside those of plain files."""

from __future__ import annotations

import json
from pathlib import Path

from workers.bench.__main__ import main


def test_rates_of_blocks_and_of_plain_files(tmp_path: Path) -> None:
    out = tmp_path / "files.json"
    assert main(["--quick", "--json", str(out), "kv-files", "--folder", str(tmp_path)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert [figure["name"] for figure in figures] == [
        "blocks, written", "blocks, read from the disk", "blocks, read from memory", "plain files, written",
        "the same, then to the disk", "plain files, read from the disk", "plain files, read from memory",
    ]  # fmt: skip
    assert all(figure["unit"] == "MB/s" and figure["low"] > 0 for figure in figures)
    assert [path.name for path in tmp_path.iterdir()] == ["files.json"]
