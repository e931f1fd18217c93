"""The Ray actor of a stage process: Ray places and starts it and notices its death; calls and data go over gRPC."""

from __future__ import annotations

import os

from protos.node.node_check import NodeCheck, interface_address
from protos.stage.identity import PrivateKey
from protos.stage.messages import StageAddress, StageProcessSpec
from workers.stage.server import StageServer, limit_threads


class StageActor:
    """One shard of one stage. `open` is called once, then `serve`; a restarted actor is a new one.

    `request_certificate` comes before `open` where stages on several nodes speak TLS.
    """

    def __init__(self) -> None:
        self._server: StageServer | None = None
        self._key: PrivateKey | None = None

    def request_certificate(self) -> bytes:
        """Make a key, which never leaves this process; returns its request for a certificate, PEM."""
        self._key = PrivateKey()
        return self._key.request()

    def open(self, spec: StageProcessSpec, check: NodeCheck) -> StageAddress:
        """Check this node and listen. Torch is not imported yet, so thread counts can still be set.

        Raises:
            NodeError: this node differs from that of the head process.
        """
        import ray

        os.umask(0o077)  # whatever this process writes is private
        check.run()
        limit_threads(spec.threads)
        bind = ""
        if spec.listen_tcp:
            interface = spec.network_interface
            bind = interface_address(interface) if interface else ray.util.get_node_ip_address()
        identity = None
        if spec.certificate:
            assert self._key is not None, "request_certificate comes first"
            identity = self._key.identity(spec.certificate, spec.authority)
        self._server = StageServer(spec, identity)
        return self._server.start(str(ray.get_runtime_context().get_node_id()), bind)

    def serve(self) -> None:
        """Block until the shard is closed; Ray's own loop would poll for signals a hundred times a second."""
        assert self._server is not None, "open comes first"
        self._server.wait()
