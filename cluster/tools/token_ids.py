"""Token ids as a file gives them: a JSON list of whole numbers."""

from __future__ import annotations

import json


def parse_token_ids(data: bytes) -> list[int]:
    """Return the ids of a file. Raises ValueError that says what the file must be."""
    try:
        ids = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): must be a list of token ids such as [1, 2, 3]") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError("must be a JSON list of whole numbers such as [1, 2, 3]")
    return ids
