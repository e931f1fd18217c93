"""Documents as files: out of a head with tokens and stored KV, and into another one."""

from __future__ import annotations

import hashlib
import logging
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from cluster.common.text_format import escape_unprintable
from cluster.config.memory_budget import kv_dtype
from cluster.engine.attention_report import describe_positions, describe_sparsity
from cluster.engine.pipeline import cache_root
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.document.archive import (
    IDS,
    MANIFEST,
    PIECE_BYTES,
    TEXT,
    ArchivedBlock,
    ArchivedDocument,
    ArchivedModel,
    ArchiveReader,
    ArchiveWriter,
    Manifest,
    bad_archive,
    joined,
)
from cluster.jobs.document.chain import chain_ids
from cluster.jobs.document.kv import DocumentKv
from cluster.jobs.document.kv_transfer import KvIntake, kv_members, left_out, ready_shards
from cluster.jobs.document.tokens import DocumentTokens
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import SCALE_TO_COME, DocumentRecord, InvalidJob, JobDamaged
from cluster.jobs.prompts import document_ids, has_length_scale
from cluster.jobs.tenants.tenant import ANYONE, Tenant, kv_owner_of, owned_id
from protos.errors import UserError

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle

_TOKENS_A_BYTE = 4  # at most, and a few more; any tokenizer makes fewer
_log = logging.getLogger(__name__)


class DocumentTransfer:
    """Exports and imports documents; any thread may call it."""

    def __init__(
        self, runtime: ClusterRuntime, documents: DocumentStore, tokens: DocumentTokens, account: DocumentKv
    ) -> None:
        self._runtime = runtime
        self._documents = documents
        self._tokens = tokens
        self._account = account
        self._kv = runtime.kv_store

    # --- export ------------------------------------------------------------------------------------------------------

    def export(self, document_id: str, with_kv: bool) -> Iterator[bytes]:
        """Return the archive of a document in pieces.

        Raises:
            JobNotFound, DocumentDamaged, JobStoreError: as of `DocumentStore.read`. ServiceBusy: as of `document_ids`.
            NotReady: its KV cannot be reached, also while it is read.
        """
        ids = self._ids(document_id)
        record, content = self._documents.get(document_id), self._documents.read(document_id)
        blocks: tuple[ArchivedBlock, ...] = ()
        shards: list[GrpcStageHandle] = []
        if with_kv and self._kv.is_enabled:
            noted = self._documents.store.document_kv([document_id]).get(document_id, {})
            if keys := [key for key, pinned_len in noted.items() if record.scale_len in (0, pinned_len)]:
                shards = ready_shards(self._kv)
                end = self._tokens.head_tokens() + len(ids) if record.shared else sys.maxsize  # questions are private
                blocks = tuple(
                    ArchivedBlock(key.hex(), parent.hex(), start)
                    for key, parent, start in self._kv.chained(keys)
                    if start + self._kv.block_tokens <= end
                )
        *before, own = chain_ids(content, record.seams)  # the same ids for every owner
        document = ArchivedDocument(
            own, record.name, record.size_bytes, len(ids), max(0, record.scale_len), record.source_hash,
            before[-1] if before else "", record.seams,
        )  # fmt: skip
        mark = self._tokens.mark() if ids else ""
        manifest = Manifest(
            document, self._model(record.kernel_family, kv_owner_of(record)), mark, self._kv.block_tokens, blocks
        )
        writer = ArchiveWriter()

        def members() -> Iterator[bytes]:
            listing = manifest.to_json()
            yield from writer.member(MANIFEST, len(listing), [listing])
            yield from writer.member(TEXT, len(content), _cut(content))
            if ids:
                packed = _swapped(array("I", ids)).tobytes()
                yield from writer.member(IDS, len(packed), _cut(packed))
            yield from kv_members(writer, self._documents, shards, [block.key for block in blocks])
            yield from writer.end()

        return joined(members())

    def _ids(self, document_id: str) -> array[int]:
        """Return the token ids; none where there is no tokenizer, or the text cannot be tokenised."""
        ids = array("I")
        if not self._runtime.ids_only:
            try:
                ids.extend(document_ids(self._runtime, self._tokens, document_id))
            except JobDamaged:
                raise
            except InvalidJob as error:
                _log.info("document %s is exported without token ids: %s", document_id, error)
        return ids

    def _model(self, kernel_family: str, kv_owner: str) -> ArchivedModel:
        """Return what KV of an owner depends on here. Raises EngineError before the first start."""
        deployment, launched = self._runtime.deployment, self._runtime.launched
        root = cache_root(deployment, launched.fingerprint)
        if kv_owner and not deployment.config.prefill.share_across_keys:
            root = hashlib.sha256(root + kv_owner.encode()).digest()
        return ArchivedModel(
            fingerprint=launched.fingerprint,
            dtype=launched.dtype,
            kv_dtype=kv_dtype(deployment),
            positions=describe_positions(deployment.spec),
            sparse=describe_sparsity(deployment.spec),
            root=root.hex(),
            kernel_family=kernel_family or launched.kernel_family,
        )

    # --- import ------------------------------------------------------------------------------------------------------

    def take_in(self, pieces: Iterable[bytes], max_bytes: int, tenant: Tenant = ANYONE) -> DocumentRecord:
        """Store the document of an archive, with its token ids and KV as far as they can be used here.

        All of the archive is checked before the document is there; the log says why its KV is left out.

        Args:
            max_bytes: of the text.
            tenant: owns the document. KV is believed, and found by what it says it is of, so only an admin brings it.
                So are token ids: others could bring those of control tokens.

        Raises:
            InvalidJob: the archive is damaged, none of ours, or its text too large. ServiceBusy: no room for it.
                NotReady: its KV cannot be put into the stores now. Nothing is kept then.
        """
        reader = ArchiveReader(pieces)
        manifest = reader.manifest()
        said = manifest.document
        member = reader.next()
        if member is None or (member.name, member.size) != (TEXT, said.size_bytes):
            raise bad_archive(f"{TEXT} is missing, or not of the size that {MANIFEST} says: export it again")
        scale_len = said.scale_len or (SCALE_TO_COME if has_length_scale(self._runtime) else 0)
        record = DocumentRecord(
            said.id, said.name, said.size_bytes, 0.0, 0.0, scale_len=scale_len, source_hash=said.source_hash,
            parent=said.parent, seams=said.seams,
        )  # fmt: skip
        family, own = self._family(manifest), owned_id(tenant.name, said.id)
        problem = self._problem(manifest, family, scale_len, tenant, own)
        intake = KvIntake(self._kv, self._documents, manifest.blocks, problem)
        ids = array("I")

        def finish() -> str:
            self._read_rest(reader, manifest, ids, intake)
            if intake.problem or not intake.taken:
                return ""
            self._account.add_imported(own, said.scale_len, intake.taken)
            return family

        with self._account.importing(intake.keys):
            stored = self._documents.put_archived(record, reader.data(), max_bytes, finish, tenant)
        if ids and tenant.is_admin:
            with suppress(UserError):  # they are made anew
                self._tokens.adopt(stored.id, ids)
        if intake.problem and manifest.blocks:
            _log.warning("document %s is imported without its KV: %s", stored.id, escape_unprintable(intake.problem))
        if intake.taken:
            self._kv.refresh()
        return self._documents.get(stored.id)

    def _read_rest(self, reader: ArchiveReader, manifest: Manifest, ids: array[int], intake: KvIntake) -> None:
        """Read what comes after the text up to the end; `ids` are added to if they can be used here."""
        said = manifest.document
        member = reader.next()
        if manifest.tokenizer:
            is_possible = said.tokens <= _TOKENS_A_BYTE * said.size_bytes + 16
            if not is_possible or member is None or (member.name, member.size) != (IDS, 4 * said.tokens):
                raise bad_archive(f"{IDS} is missing, or not of the size that {MANIFEST} says: export it again")
            if self._mark() == manifest.tokenizer:
                ids.frombytes(b"".join(reader.data()))
                if max(_swapped(ids), default=0) >= self._runtime.deployment.spec.vocab_size:
                    raise bad_archive(f"{IDS}: a token that this model does not have: export it again")
            else:
                reader.skip()
            member = reader.next()
        while member is not None:
            intake.take(member, reader)
            member = reader.next()
        intake.end_block()

    def _mark(self) -> str:
        with suppress(UserError):
            return self._tokens.mark()
        return ""

    def _family(self, manifest: Manifest) -> str:
        """Return the family of kernels for the record: "" where they are those of this cluster."""
        family = manifest.model.kernel_family
        return "" if not manifest.blocks or family == self._runtime.launched.kernel_family else family

    def _problem(self, manifest: Manifest, family: str, scale_len: int, tenant: Tenant, own: str) -> str:
        """Return why the KV of an archive cannot be used here, or ""; `own` is the id of the document here."""
        if not self._kv.is_enabled:
            return "this cluster stores no KV (kv_store.enabled)"
        if not tenant.is_admin:
            return "only an admin key may bring KV"
        ours, theirs = self._model("", tenant.name), manifest.model
        names = {
            "model (fingerprint)": "fingerprint", "type of computation": "dtype", "type of KV": "kv_dtype",
            "kind of positions": "positions", "sparse prefill": "sparse", "digest of all settings": "root",
        }  # fmt: skip
        if problem := left_out(
            {"kv_store.block_tokens": str(self._kv.block_tokens)}
            | {name: getattr(ours, field) for name, field in names.items()},
            {"kv_store.block_tokens": str(manifest.block_tokens)}
            | {name: getattr(theirs, field) for name, field in names.items()},
        ):
            return problem
        known = self._documents.store.get_document(own)
        if known is not None and known.scale_len == SCALE_TO_COME:
            self._ids(known.id)
            known = self._documents.store.get_document(known.id)
        if known is not None and known.kernel_family != family:
            return (
                f"the document is here already, with KV of other kernels ({known.kernel_family or 'ours'}): delete it"
            )
        if known is not None and known.scale_len not in (0, scale_len):
            return f"the document is here already, with the length scale of {known.scale_len} tokens: delete it"
        return ""


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))


def _swapped(ids: array[int]) -> array[int]:
    """Return ids between the order of bytes here and that of an archive."""
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
