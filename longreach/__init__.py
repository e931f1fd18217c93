"""What users of Longreach import: the clients of a running head, what they return and raise, and `LocalCluster`.

>>> from longreach import Client
>>> with Client("127.0.0.1:7777") as client:
...     print(client.submit("... a long document ...", "What was decided?").result.text)
"""

from __future__ import annotations

from typing import Any

import cluster

__docformat__ = "google"  # of the docstrings, for pdoc


def __getattr__(name: str) -> Any:
    if name == "__all__":  # for `import *` and for tools that look at the names in the module afterwards
        globals().update({name: getattr(cluster, name) for name in cluster.__all__})
        return cluster.__all__
    return getattr(cluster, name)


def __dir__() -> list[str]:
    return sorted(cluster.__all__)
