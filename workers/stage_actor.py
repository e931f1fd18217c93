"""The Ray actor around a stage process: Ray places it, starts it and notices its death; all talk goes over gRPC."""

from __future__ import annotations

import os

from workers.stage_server import StageAddress, StageProcessSpec, StageServer, limit_threads


class StageActor:
    """One shard of one stage. `open` is called once; a restarted actor is a new one with a new epoch."""

    def __init__(self) -> None:
        self._server: StageServer | None = None

    def open(self, spec: StageProcessSpec) -> StageAddress:
        """Listen; torch is not imported yet, so thread counts can still be set."""
        limit_threads(spec.threads)
        self._server = StageServer(spec, on_orphan=lambda: os._exit(3))
        return self._server.start()

    def close(self) -> None:
        """Free the model; may be called twice."""
        if self._server is not None:
            self._server.close()
            self._server = None
