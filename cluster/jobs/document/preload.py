"""Stored KV of documents is loaded into memory before anybody asks: after a start, and after an import."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from cluster.common.errors import ClusterError, JobStoreError
from cluster.common.text_format import one_line
from cluster.common.watched_thread import WatchedThread
from cluster.engine.outputs import GenerationSpec, PrefillProgress
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.document.tokens import DocumentTokens
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import DocumentRecord, JobError, JobInput, JobSpec
from cluster.jobs.prompts import job_prompts
from cluster.jobs.tenants.tenant import kv_owner_of
from protos.errors import UserError
from protos.jobs.sampling import AnswerOptions

PRIORITY = -(1 << 31)  # jobs go first
MOST_COMPUTED = 16384  # tokens: the end of a document, beyond its last whole cell and block
_log = logging.getLogger(__name__)

StoredTokens = Callable[[Sequence[DocumentRecord]], Mapping[str, tuple[int, int]]]  # of `JobService.stored_kv`


class DocumentPreload:
    """A thread that loads what is stored of documents, one at a time; it computes no more than a document's end.

    Loaded pages belong to nobody: whoever needs memory takes them.

    Args:
        stored: returns, by document, how many of its first tokens are stored.
    """

    def __init__(
        self, runtime: ClusterRuntime, documents: DocumentStore, tokens: DocumentTokens, stored: StoredTokens
    ) -> None:
        self._runtime = runtime
        self._documents = documents
        self._tokens = tokens
        self._stored = stored
        self._queue: queue.Queue[str] = queue.Queue()
        self._closing = threading.Event()
        self._handle: RequestHandle | None = None
        self.thread = WatchedThread(self._run, "preload", self._closing)

    def start(self) -> None:
        """Load the documents that were used last; the runtime must be running."""
        if self._runtime.kv_store.is_enabled and self._share and not self._runtime.ids_only:
            self._queue.put("")
        self.thread.start()

    def add(self, document_id: str) -> None:
        """Load a document, if there is a share of memory for it."""
        if self._share:
            self._queue.put(document_id)

    def close(self) -> None:
        self._closing.set()
        self._cancel_soon()
        self._queue.put("")
        self.thread.join()

    @property
    def is_busy(self) -> bool:
        """Whether something is being loaded, or is to be."""
        return self._queue.unfinished_tasks > 0

    @property
    def _share(self) -> float:
        return self._runtime.deployment.config.kv_store.preload

    def _run(self) -> None:
        while not self._closing.is_set():
            document_id = self._queue.get()
            try:
                if self._closing.is_set():
                    return
                for record, tokens in self._chosen(document_id):
                    self._load(record, tokens)
            except (JobError, UserError, ClusterError, JobStoreError) as error:  # whoever asks is told, or reads it
                _log.info("stored KV is loaded when it is asked for: %s", one_line(error))
            finally:
                self._queue.task_done()

    def _chosen(self, document_id: str) -> list[tuple[DocumentRecord, int]]:
        """Return documents that fit together, with their stored tokens: one, or those pinned or used last."""
        self._runtime.kv_store.refresh()
        records = [self._documents.get(document_id)] if document_id else self._documents.list()
        stored, room, chosen = self._stored(records), self._share * self._runtime.kv_tokens, []
        for record in sorted(records, key=lambda record: (not record.pinned, -record.used)):
            tokens, _ = stored.get(record.id, (0, 0))
            if tokens and record.tokens <= room:
                room -= record.tokens
                chosen.append((record, tokens))
        return chosen

    def _load(self, record: DocumentRecord, stored: int) -> None:
        """Load what is stored of a document, and compute its end; given up when it turns out not to be stored."""
        options = AnswerOptions(max_tokens=1)
        source = JobInput(record.id, (), read=True)
        shares = self._runtime.deployment.config.prefill.share_across_keys
        (prompt,) = job_prompts(self._runtime, self._tokens, JobSpec(source, options))
        spec = GenerationSpec(
            prompt, self._runtime.resolve(options), PRIORITY, pinned_len=max(record.scale_len, len(prompt)),
            cache_salt="" if shares else kv_owner_of(record), kernel_family=record.kernel_family,
            document_id=record.id,
        )  # fmt: skip
        most = max(0, len(prompt) - stored) if len(prompt) - stored <= MOST_COMPUTED else 0
        began = time.monotonic()

        def follow(event: EngineEvent) -> None:
            if isinstance(event, PrefillProgress) and event.cached < event.processed < event.total - most:
                self._cancel_soon()

        (self._handle,) = self._runtime.engine.submit_all([(spec, follow)])
        if self._closing.is_set():
            self._cancel(self._handle)
        result = self._handle.wait()
        self._handle = None
        _log.info(
            "document %s: KV of %d of its %d tokens is in memory after %.1f s",
            record.id, result.cached_tokens, record.tokens, time.monotonic() - began,
        )  # fmt: skip

    def _cancel_soon(self) -> None:
        if (handle := self._handle) is not None:
            self._cancel(handle)

    def _cancel(self, handle: RequestHandle) -> None:
        try:
            self._runtime.engine.cancel(handle)
        except ClusterError:  # its pipeline has ended, and the request with it
            pass
