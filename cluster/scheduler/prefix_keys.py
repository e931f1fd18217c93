"""Under which hashes the pages of a prompt are known: what its KV depends on besides the tokens before it.

That is whether its rows are sparse, and the length `n` the temperature `s(n)` of dual chunk attention is taken at. A
prompt may adopt pages computed at another length when `s ** 2`, the factor on its logits, hardly differs: the lengths
in use are remembered, so that a question finds its document although every question has its own length.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cluster.scheduler.page_pool import iter_page_hashes, page_hashes
from protos.model import grid
from protos.model.spec import ModelSpec

TOLERANCE = 0.005  # relative difference of s ** 2 up to which pages of another length are adopted
_REMEMBERED = 64  # lengths; those adopted or begun last


class PrefixKeys:
    """Hashes of prompts of one deployment, and the lengths their pages may be found under.

    A length of 0 stands for "temperature 1", which all shorter prompts share.
    """

    def __init__(self, root: bytes, page_size: int, spec: ModelSpec | None) -> None:
        self._root = root
        self._page_size = page_size
        self._spec = spec
        self._in_use: OrderedDict[tuple[bool, int], None] = OrderedDict()  # (sparse, length), newest last

    def length_key(self, prompt_len: int) -> int:
        """The length a prompt's own pages are known under."""
        return 0 if self._temperature(prompt_len) == 1.0 else prompt_len

    def scale_len(self, prompt_len: int, key: int) -> int:
        """What `SequenceSlice.scale_len` says of a prompt whose pages are known under the length `key`."""
        if key == self.length_key(prompt_len):
            return 0
        assert self._spec is not None
        assert self._spec.dual_chunk is not None, "without dual chunk attention there is one length key"
        return key or self._spec.dual_chunk.original_max_position_embeddings

    def hashes(self, prompt: Sequence[int], key: int) -> list[bytes]:
        """Hashes of the pages whose KV does not depend on where the prompt ends."""
        stop = len(prompt) if self._spec is None else grid.stable_prefix(self._spec, len(prompt))
        return page_hashes(prompt[:stop], self._page_size, self._variant(len(prompt), key))

    def iter_hashes(self, prompt: Sequence[int], key: int) -> Iterator[bytes]:
        """Hashes of its pages one after the other, the unstable ones too; costs as much as is taken."""
        return iter_page_hashes(prompt, self._page_size, self._variant(len(prompt), key))

    def whole_pages(self, pages: int, prompt_len: int) -> int:
        """How many of the first `pages` a prompt can go on after: sparse ones start at a cell."""
        if self._spec is None:
            return pages
        return grid.last_cut(self._spec, pages * self._page_size, prompt_len) // self._page_size

    def note(self, prompt_len: int, key: int) -> None:
        """Remember that pages under this length are computed or read."""
        entry = self._sparse(prompt_len), key
        self._in_use[entry] = None
        self._in_use.move_to_end(entry)
        if len(self._in_use) > _REMEMBERED:
            self._in_use.popitem(last=False)

    def nearby(self, prompt_len: int) -> list[int]:
        """Other lengths in use whose pages the prompt may adopt, the nearest temperature first."""
        own, sparse = self._temperature(prompt_len) ** 2, self._sparse(prompt_len)
        found = []
        for is_sparse, key in self._in_use:
            off = abs(self._temperature(key) ** 2 / own - 1)
            if is_sparse == sparse and key != self.length_key(prompt_len) and off < TOLERANCE:
                found.append((off, key))
        return [key for _, key in sorted(found)]

    def _temperature(self, length: int) -> float:
        if self._spec is None or self._spec.dual_chunk is None or not length:
            return 1.0
        return self._spec.dual_chunk.length_scale(length)

    def _sparse(self, prompt_len: int) -> bool:
        return self._spec is not None and grid.is_sparse(self._spec, 0, prompt_len)

    def _variant(self, prompt_len: int, key: int) -> bytes:
        sparse = self._sparse(prompt_len)
        if not (sparse or key):
            return self._root
        return hashlib.sha256(self._root + f"sparse {sparse} length {key}".encode()).digest()
