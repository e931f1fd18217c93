"""The needle checkpoint with a chat template that shows tools, calls and results."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.paths import NEEDLE
from tests.support.tools.models import NEEDLE_WITH_TOOLS


def link_needle(folder: Path) -> Path:
    """Make a model directory of links to the checkpoint in the repository, with another chat template; returns it."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).symlink_to(NEEDLE / name)
    config = json.loads((NEEDLE / "tokenizer_config.json").read_text())
    config["chat_template"] = NEEDLE_WITH_TOOLS
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
