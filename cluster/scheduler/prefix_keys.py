"""Hashes of prompt pages and blocks: a hash stands for some tokens and everything else that their KV depends on.

That is the tokens before them and, where rows are sparse, those to the end of their cell; the model, whether rows are
sparse, the kernels that computed it, whose it is (the cache salt), and the length `n` of the length scale `s(n)` of
dual chunk attention. Prompts share pages at equal length scale only: questions of one job use the length of the longest
of them. Where it is asked for (`prefill.share_across_lengths`), a prompt may also adopt pages computed at another
length if `s ** 2`, the factor on its logits, hardly differs; the lengths in use are remembered for that.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from protos.model import grid
from protos.model.spec import ModelSpec

_TOLERANCE = 0.005  # relative difference of s ** 2 up to which pages of another length are adopted
_MAX_LENGTHS = 64  # lengths to remember


class Private(NamedTuple):
    """From which token on KV is of one owner alone, where a prompt begins with what is everybody's."""

    start: int
    salt: str


def page_hashes(
    token_ids: Sequence[int], page_size: int, root: bytes, depends_to: Callable[[int], int] = lambda stop: stop,
    private: Private | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """Yield the SHA-256 of every full page, chained: a hash stands for the page and everything before it.

    Blocks of the store are hashed likewise, at their own size, so that no page size changes their keys.

    Args:
        root: what else the content of KV depends on (model fingerprint, positions, dtype).
        depends_to: position after a page -> position after the last token that its content depends on: sparse rows
            depend on their whole cell, whose last rows choose the keys that all of it reads.
    """
    previous, hashed = root, 0
    for stop in range(page_size, len(token_ids) + 1, page_size):
        end = max(depends_to(stop), hashed)
        if private is not None and end > private.start:
            previous, private = hashlib.sha256(previous + private.salt.encode()).digest(), None
        tokens = array("I", token_ids[hashed:end])
        previous, hashed = hashlib.sha256(previous + tokens.tobytes()).digest(), end
        yield previous


class Origin(NamedTuple):
    """What separates KV of equal tokens beside model and length scale."""

    kernel_family: str = ""  # kernels that computed it, if not those of this cluster
    cache_salt: str = ""  # whose it is, if not everybody's
    private: Private | None = None  # whose it is from some token on


OWN = Origin()


class PrefixKeys:
    """Hashes the prompts of one deployment, and knows under which lengths their pages may be found.

    A length key is the length of the prompt that the pages were computed for, or 0 for a length scale of 1, which all
    shorter prompts share.

    Args:
        block_tokens: of a block of the store; 0: there is none.
        kernel_family: of this cluster.
    """

    def __init__(
        self, root: bytes, page_size: int, spec: ModelSpec | None, block_tokens: int = 0, kernel_family: str = ""
    ) -> None:
        self._root = root
        self._page_size = page_size
        self._spec = spec
        self._block_tokens = block_tokens
        self._kernel_family = kernel_family
        self._in_use: OrderedDict[tuple[bool, int], None] = OrderedDict()  # (is sparse, length key), newest last

    def length_key(self, prompt_len: int) -> int:
        """Return the key of pages that are computed at the length scale of a prompt of this length."""
        return 0 if self._length_scale(prompt_len) == 1.0 else prompt_len

    def scale_len(self, prompt_len: int, key: int) -> int:
        """Return the `SequenceSlice.scale_len` of a prompt whose pages are hashed under the length key `key`."""
        if key == self.length_key(prompt_len):
            return 0
        assert self._spec is not None
        assert self._spec.dual_chunk is not None, "without dual chunk attention there is one length key"
        return key or self._spec.dual_chunk.original_max_position_embeddings

    def hashes(self, prompt: Sequence[int], key: int, origin: Origin = OWN) -> Iterator[bytes]:
        """Yield the hashes of the pages whose KV does not depend on where the prompt ends, each computed when taken."""
        return self._chain(prompt, self._page_size, key, origin)

    def block_keys(self, prompt: Sequence[int], key: int, origin: Origin = OWN) -> Iterator[bytes]:
        """Yield the keys of the blocks whose KV does not depend on where the prompt ends; none without a store."""
        if not self._block_tokens:
            return iter(())
        return self._chain(prompt, self._block_tokens, key, origin)

    def usable_pages(self, pages: int, prompt_len: int) -> int:
        """Return how many of the first `pages` a prompt can continue after: sparse rows start at a cell."""
        if self._spec is None:
            return pages
        return grid.last_cut(self._spec, pages * self._page_size, prompt_len) // self._page_size

    def remember(self, prompt_len: int, key: int) -> None:
        """Note that pages under this length key are computed or read."""
        entry = self._is_sparse(prompt_len), key
        self._in_use[entry] = None
        self._in_use.move_to_end(entry)
        if len(self._in_use) > _MAX_LENGTHS:
            self._in_use.popitem(last=False)

    def similar_keys(self, prompt_len: int, own: int) -> list[int]:
        """Return the other length keys in use whose length scale hardly differs from that of `own`, the nearest first.

        Args:
            own: the length key of the pages that the prompt computes by itself.
        """
        is_sparse, square = self._is_sparse(prompt_len), self._length_scale(own) ** 2
        differences = [
            (abs(self._length_scale(key) ** 2 / square - 1), key)
            for sparse, key in self._in_use
            if sparse == is_sparse and key != own
        ]
        return [key for difference, key in sorted(differences) if difference < _TOLERANCE]

    def _chain(self, prompt: Sequence[int], size: int, key: int, origin: Origin) -> Iterator[bytes]:
        """Yield the hashes of pieces of `size` tokens whose KV does not depend on where the prompt ends."""
        spec, length = self._spec, len(prompt)
        root = self._root_of(length, size, key, origin)
        if spec is None or not self._is_sparse(length):
            return page_hashes(prompt, size, root, private=origin.private)
        stable = grid.last_cut(spec, length, length)
        pieces = page_hashes(
            prompt, size, root, lambda stop: grid.next_cut(spec, stop - 1, length) or stop, origin.private
        )
        return islice(pieces, stable // size)

    def _root_of(self, prompt_len: int, size: int, key: int, origin: Origin) -> bytes:
        """Return the start of the chain of pieces of `size` tokens: the first ones of two sizes may lie in one cell."""
        family = origin.kernel_family or self._kernel_family
        values = [self._is_sparse(prompt_len), size, key, family, origin.cache_salt]
        return hashlib.sha256(self._root + json.dumps(values).encode()).digest()

    def _length_scale(self, length: int) -> float:
        if self._spec is None or self._spec.dual_chunk is None or not length:
            return 1.0
        return self._spec.dual_chunk.length_scale(length)

    def _is_sparse(self, prompt_len: int) -> bool:
        return self._spec is not None and grid.is_sparse(self._spec, 0, prompt_len)
