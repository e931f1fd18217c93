"""Where the small model of the demo is."""

from __future__ import annotations

from pathlib import Path

from cluster.config.configs_dir import configs_dir


def needle_dir() -> Path:
    """Return the folder of the demo model, with its tokenizer and the book and words its documents are made of."""
    return configs_dir() / "needle"
