"""Errors of the server side: what keeps a cluster from starting or going on. Each message is one line for the user.

Input that the user can mend is a `protos.errors.UserError` instead; the client library has errors of its own
(`cluster.client.errors`).
"""

from __future__ import annotations


class ClusterError(RuntimeError):
    """The cluster cannot be started, or cannot go on."""


class PreflightError(ClusterError):
    """The deployment cannot start here: port, certificate, key file or memory. The message names the way out."""


class PlacementError(ClusterError):
    """Ray cannot be reached, or has no room for the actors."""


class StageError(ClusterError):
    """A shard could not be loaded, started or reached."""


class EngineError(ClusterError):
    """The cluster behind the engine failed."""


class JobStoreError(ClusterError):
    """The job store failed: the disk, the file, or a write that does not follow the last one."""
