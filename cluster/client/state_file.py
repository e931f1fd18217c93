"""The file in which a ready head describes itself to clients on its machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cluster.client.errors import START_HINT, Unavailable

DEFAULT_DATA_DIR = "~/.local/share/longreach"  # as in cluster.config.schema
STATE_FILE = "head.json"  # under the data directory, while a head is ready


def read_state(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a ready head wrote: address, pid, started (seconds since 1970), ca_file, server_name.

    `ca_file` is its certificate and empty without TLS; `server_name` is a name in it when the address is none.

    Raises:
        Unavailable: no head is ready under this data directory.
    """
    path = Path(data_dir).expanduser() / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
        values = {"address": str(state["address"]), "pid": int(state["pid"]), "started": float(state["started"])}
        return values | {key: str(state.get(key, "")) for key in ("ca_file", "server_name")}
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror}): {START_HINT}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{path}: is not the state of a head: delete it, then: longreach up CONFIG") from error
