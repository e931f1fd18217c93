"""Folders of the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
NEEDLE = CONFIGS / "needle"
HARDWARE = CONFIGS / "hardware.yaml"  # the one YAML that describes no cluster
