"""What users of Longreach import: `from longreach import Client`. Every name lives in `cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cluster

if TYPE_CHECKING:
    from cluster import *  # noqa: F403

__all__ = cluster.__all__


def __getattr__(name: str) -> Any:
    return getattr(cluster, name)


def __dir__() -> list[str]:
    return sorted(__all__)
