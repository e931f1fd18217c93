"""Token ids as a file gives them: a JSON list of whole numbers."""

from __future__ import annotations

import json

_MAX_BYTES_OF_ID = 64  # in JSON: ten digits, a comma, and room for any usual white space


def check_num_bytes(num_bytes: int, max_tokens: int) -> None:
    """Refuse a file that is too large for `max_tokens` ids before it is read. Raises ValueError."""
    if num_bytes > (limit := _MAX_BYTES_OF_ID * (max_tokens + 1)):
        raise ValueError(f"{num_bytes} bytes: must be at most {limit} for max_model_len {max_tokens}")


def parse_token_ids(data: bytes) -> list[int]:
    """Return the ids of a file. Raises ValueError that says what the file must be."""
    try:
        ids = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): must be a list of token ids such as [1, 2, 3]") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError("must be a JSON list of whole numbers such as [1, 2, 3]")
    return ids
