"""Checks of one machine: the head makes them on its own, an actor on every other node. No torch."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from protos.errors import UserError
from protos.model.checkpoint import fingerprint_of
from protos.model.files import is_gguf
from protos.model.folder import hub_source, on_this_node
from protos.node.environment import build_id


class NodeError(RuntimeError):
    """A machine cannot take part; one line with the way out."""


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """What every node must have in common with the head. `fingerprint` is empty when no weights are read."""

    build_id: str
    model_path: str
    fingerprint: str
    data_dir: str

    def run(self) -> None:
        """Compare this machine with the head. Raises NodeError naming the machine, the key and both values."""
        try:
            if build_id() != self.build_id:
                raise NodeError(f"longreach build {build_id()}, the head has {self.build_id}: install one")
            if self.fingerprint:
                self._compare_model(Path(self.model_path))
            check_writable(Path(self.data_dir))
        except (NodeError, UserError) as error:
            raise NodeError(f"node {os.uname().nodename}: {error}") from error

    def _compare_model(self, named: Path) -> None:
        model = on_this_node(named)
        if not (model if is_gguf(model) else model / "config.json").is_file():
            missing = "no such file" if is_gguf(model) else "no config.json there"
            raise NodeError(f"model.path: {model}: {missing}: {_copy(model)}")
        if (fingerprint := fingerprint_of(model)) != self.fingerprint:
            both = f"its checkpoint is {fingerprint[:12]}, the head's {self.fingerprint[:12]}"
            raise NodeError(f"model.path: {model}: {both}: copy the same files to every node")


def _copy(model: Path) -> str:
    """Return how a model gets to a node."""
    if (source := hub_source(model)) is None:
        return "copy the model"
    repository, commit = source
    return f"copy it there, or run on this node: hf download {repository} --revision {commit}"


def check_writable(data_dir: Path) -> None:
    """Make the data directory and write to it. Raises NodeError."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        raise NodeError(f"data_dir: {data_dir}: cannot be written ({error.strerror}): choose another") from error


def interface_address(name: str) -> str:
    """Return the IPv4 address of a network interface of this machine. Raises NodeError."""
    interfaces = psutil.net_if_addrs()
    if name not in interfaces:
        known = ", ".join(sorted(interfaces))
        raise NodeError(f"cluster.network_interface: {name}: not on {os.uname().nodename}, which has {known}")
    addresses = [str(each.address) for each in interfaces[name] if each.family == socket.AF_INET]
    if not addresses:
        raise NodeError(f"cluster.network_interface: {name}: has no IPv4 address on {os.uname().nodename}")
    return addresses[0]
