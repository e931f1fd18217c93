"""Where the configurations are that ship with Longreach."""

from __future__ import annotations

import sysconfig
from pathlib import Path

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def configs_dir() -> Path:
    """Return the folder of shipped configurations: `configs/` of a source checkout, else `longreach_configs`.

    Raises:
        FileNotFoundError: neither is there.
    """
    site_packages = Path(sysconfig.get_paths()["purelib"])
    candidates = [_PACKAGE_ROOT / "configs", _PACKAGE_ROOT / "longreach_configs", site_packages / "longreach_configs"]
    for folder in candidates:
        if (folder / "demo.yaml").is_file() or (folder / "needle").is_dir():
            return folder
    raise FileNotFoundError(f"no configs folder at {candidates[0]} or {candidates[1]}: reinstall longreach")
