"""Checks made before anything is started: everything that can be refused in seconds is refused here.

Legend: the head is this process; a node is a machine that will hold stages.
"""

from __future__ import annotations

import logging
import socket

from cluster.common.errors import PreflightError
from cluster.common.units import format_bytes
from cluster.config.deployment import Deployment
from cluster.config.memory_budget import kv_budget, kv_token_bytes
from protos.model.checkpoint import Checkpoint, fingerprint_of
from protos.node.node_check import check_writable
from protos.stage.messages import LoadProgress

_log = logging.getLogger(__name__)


def check_head(deployment: Deployment) -> str:
    """Check data directory, KV size and checkpoint on the head; return the checkpoint's fingerprint, empty with dummy
    weights.

    Raises:
        PreflightError, NodeError, or CheckpointError naming file and tensor.
    """
    config = deployment.config
    check_writable(config.data_dir)
    if config.kv_cache.bytes is not None:
        check_room(deployment, config.kv_cache.bytes)
    if config.model.load_format == "dummy":
        return ""
    Checkpoint.open(config.model.path, deployment.spec)
    return fingerprint_of(config.model.path)


def check_port(host: str, port: int) -> None:
    """Raise PreflightError when another process holds the port; port 0 means no listener."""
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PreflightError(
                f"server.port: {port}: cannot be bound on {host} ({error.strerror}): choose a free port, or 0 for none"
            ) from error


def check_room(deployment: Deployment, budget: int) -> int:
    """Return the pages that `budget` bytes hold on the shard whose tokens are largest.

    Raises:
        PreflightError: one context of max_model_len would not fit, and the YAML asks for it; or not even a page.
    """
    page_size, widest = deployment.config.kv_cache.page_size, kv_token_bytes(deployment)
    pages, longest = budget // (widest * page_size), -(-deployment.max_model_len // page_size)
    if pages < longest and (not deployment.limits_context or not pages):
        raise PreflightError(
            f"kv_cache: room for {pages * page_size} tokens an actor, "
            f"model.max_model_len is {deployment.max_model_len}: "
            f"give kv_cache.bytes at least {format_bytes(longest * page_size * widest)}, or lower max_model_len"
            + ("" if deployment.config.kv_cache.dtype != "auto" else ", or say kv_cache.dtype: int8")
        )
    return pages


def count_pages(deployment: Deployment, loaded: list[LoadProgress], shards_per_node: int) -> int:
    """Return the KV pages that every shard allocates: what the tightest one affords, at most what sequences can use.

    Raises:
        PreflightError: as of `check_room`, beside what a step needs while it runs.
    """
    config = deployment.config
    sharers = 1 if config.cluster.device == "cuda" else shards_per_node
    budget = kv_budget(deployment, loaded, sharers)
    pages, longest = check_room(deployment, budget), -(-deployment.max_model_len // config.kv_cache.page_size)
    if pages < longest:
        _log.warning(
            "model.max_model_len is not given: contexts are limited to %d tokens, which the KV cache holds, of %d that "
            "the positions cover: all of them need %s for it (kv_cache.bytes)",
            pages * config.kv_cache.page_size, deployment.max_model_len,
            format_bytes(longest * config.kv_cache.page_size * kv_token_bytes(deployment)),
        )  # fmt: skip
    return min(pages, longest * config.prefill.max_num_seqs)
