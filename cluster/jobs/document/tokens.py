"""Token ids of documents: made once, kept beside the text, and used by every job.

A document that was appended to another is tokenised in parts, so that the ids of the other one are the first of its
own. Ids that are damaged, or of another tokenizer, are made anew.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from array import array
from collections.abc import Callable, Sequence

from cluster.common.errors import JobStoreError
from cluster.common.text_format import one_line
from cluster.common.watched_thread import WatchedThread
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.document.chain import chain_ids
from cluster.jobs.document.token_file import read_tokens, tokens_path, write_tokens
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import SCALE_TO_COME, DocumentRecord, JobError
from cluster.jobs.tenants.tenant import owned_id
from cluster.text.literal_tokenizer import Place
from cluster.text.prompts import PromptError, document_place, head_tokens
from protos.errors import UserError

SCALE_STEP = 4096
_LOCKS = 64
_log = logging.getLogger(__name__)


def default_scale_len(tokens: int, max_model_len: int) -> int:
    """Return the length whose length scale a document of so many tokens gets, if nobody says to what it may grow.

    The next multiple of SCALE_STEP and as much again: questions of any length, and small appends, have room below it,
    so that they all use one scale; and the factor on the logits is at most 1 % off that of the document's own length
    from 160,000 tokens on.
    """
    return min(max_model_len, -(-tokens // SCALE_STEP) * SCALE_STEP + SCALE_STEP)


class DocumentTokens:
    """Gives the ids of stored documents; any thread may call it. Different documents do not wait for each other."""

    def __init__(self, runtime: ClusterRuntime, documents: DocumentStore) -> None:
        self._runtime = runtime
        self._documents = documents
        self._head_tokens: int | None = None
        self._locks = [threading.Lock() for _ in range(_LOCKS)]  # by a hash of the id: nothing is tokenised twice

    def ids(
        self, document_id: str, place: Place, check_size: Callable[[int], None] = lambda size: None
    ) -> Sequence[int]:
        """Return the ids of a document at a place of its prompt.

        Args:
            check_size: called with the bytes before a text is read; raises to refuse it.

        Raises:
            JobNotFound, DocumentDamaged, JobStoreError: as of `DocumentStore.read`. PromptError, TokenizerError: it is
                no text, or too long.
        """
        with self._locks[hash(document_id) % _LOCKS]:
            record = self._documents.get(document_id)
            path = tokens_path(self._documents.path(document_id))
            ids = read_tokens(path, self._fingerprint(document_id, place))
            content = self._documents.read(document_id, check_size)  # a damaged one is told whatever its ids are
            self._runtime.check_document(content)
            if ids is None:
                ids = self._make(record, content, place)
                self._keep(document_id, place, ids)
            if record.tokens != len(ids) or record.scale_len == SCALE_TO_COME:
                self._documents.store.count_document(
                    document_id, len(ids), default_scale_len(len(ids), self._runtime.max_model_len)
                )
            return ids

    def count(self, document_id: str) -> Sequence[int]:
        """Return the ids where prompts have the document, and so note how many there are. Raises as `ids`."""
        return self.ids(document_id, self.place())

    def mark(self) -> str:
        """Return a digest of all but the text that ids depend on, "" without a tokenizer. Raises as `ids`."""
        if self._runtime.ids_only:
            return ""
        what = self._runtime.tokenizer.fingerprint + self.place().name.encode()
        return hashlib.sha256(what).hexdigest()

    def adopt(self, document_id: str, ids: Sequence[int]) -> None:
        """Take the ids of a document that were made elsewhere, by equal means, unless it has its own."""
        place = self.place()
        with self._locks[hash(document_id) % _LOCKS]:
            record = self._documents.get(document_id)
            path = tokens_path(self._documents.path(document_id))
            if read_tokens(path, self._fingerprint(document_id, place)) is None:
                self._keep(document_id, place, ids)
                self._documents.store.count_document(
                    record.id, len(ids), default_scale_len(len(ids), self._runtime.max_model_len)
                )

    def place(self) -> Place:
        """Return the place of documents in prompts. Raises TokenizerError, ChatTemplateError."""
        return document_place(self._runtime.tokenizer, self._runtime.deployment.config.model.document_prompt)

    def head_tokens(self) -> int:
        """Return how many tokens come before documents in prompts, 0 while that cannot be told; kept once known."""
        if self._head_tokens is None and not self._runtime.ids_only:
            try:
                template = self._runtime.deployment.config.model.document_prompt
                self._head_tokens = head_tokens(self._runtime.tokenizer, template)
            except UserError as error:
                _log.info("the tokens before a document are not counted: %s", one_line(error))
        return self._head_tokens or 0

    def _fingerprint(self, document_id: str, place: Place) -> bytes:
        what = f"{document_id} {place.name}".encode()
        return hashlib.sha256(self._runtime.tokenizer.fingerprint + what).digest()

    def _make(self, record: DocumentRecord, content: bytes, place: Place) -> array[int]:
        """Tokenise what is not yet part of the ids of a document that came before."""
        runtime, limit = self._runtime, self._runtime.max_model_len
        begins = (0, *record.seams)
        ids, first = array("I"), 0
        earlier_ids = chain_ids(content, record.seams)
        for part in range(len(begins) - 1, 0, -1):
            earlier = owned_id(record.owner, earlier_ids[part - 1])
            known = read_tokens(tokens_path(self._documents.path(earlier)), self._fingerprint(earlier, place))
            if known is not None:
                ids, first = known, part
                break
        for part in range(first, len(begins)):
            end = begins[part + 1] if part + 1 < len(begins) else len(content)
            try:
                text = content[begins[part] : end].decode()
            except UnicodeDecodeError as error:
                raise PromptError(
                    f"document: what was appended at byte {begins[part]} is not UTF-8 by itself ({error.reason}): "
                    "append whole characters"
                ) from error
            ids.extend(runtime.tokenizer.encode_literal(text, place if part == 0 else Place.INSIDE, limit))
        return ids

    def _keep(self, document_id: str, place: Place, ids: Sequence[int]) -> None:
        path = tokens_path(self._documents.path(document_id))
        try:
            write_tokens(path, self._fingerprint(document_id, place), ids)
        except OSError as error:  # they are made again with the next job
            _log.warning("document %s: its token ids cannot be kept: %s", document_id, error)


class DocumentCounter:
    """A thread that tokenises documents after their upload, one at a time; their first job then finds the ids.

    Args:
        count: tokenises a document, by its id.
    """

    def __init__(self, count: Callable[[str], object]) -> None:
        self._count = count
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.thread = WatchedThread(self._run, "tokenizer", self._closing)

    def start(self, document_ids: Sequence[str]) -> None:
        for document_id in document_ids:
            self.add(document_id)
        self.thread.start()

    def add(self, document_id: str) -> None:
        self._queue.put(document_id)

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (document_id := self._queue.get()) is not None:
            if self._closing.is_set():
                return
            try:
                self._count(document_id)
            except (JobError, UserError, JobStoreError) as error:  # whoever asks about it is told
                _log.info("document %s is not counted: %s", document_id, one_line(error))
