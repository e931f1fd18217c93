"""What a node must have in common with the head, and how each difference is told."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from huggingface_hub import constants

from protos.model.checkpoint import fingerprint_of
from protos.node.environment import build_id
from protos.node.node_check import NodeCheck, NodeError, check_writable, interface_address
from tests.support.paths import NEEDLE

NODE = os.uname().nodename


def said(check: NodeCheck) -> str:
    with pytest.raises(NodeError) as caught:
        check.run()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"node {NODE}: ")


def test_an_equal_node_passes(tmp_path: Path) -> None:
    NodeCheck(build_id(), "/nowhere", "", str(tmp_path / "data")).run()  # dummy weights are not looked for
    NodeCheck(build_id(), str(NEEDLE), fingerprint_of(NEEDLE), str(tmp_path / "data")).run()
    assert (tmp_path / "data").is_dir()
    assert list((tmp_path / "data").iterdir()) == []


def test_each_difference_is_named(tmp_path: Path) -> None:
    data, mark = str(tmp_path / "data"), fingerprint_of(NEEDLE)
    assert (
        said(NodeCheck("x" * 16, "", "", data)) == f"longreach build {build_id()}, the head has {'x' * 16}: install one"
    )
    assert (
        said(NodeCheck(build_id(), "/nowhere", mark, data))
        == "model.path: /nowhere: no config.json there: copy the model"
    )
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(NEEDLE / name, other / name)
    (other / "config.json").write_text("{}")
    message = said(NodeCheck(build_id(), str(other), mark, data))
    assert message.startswith(f"model.path: {other}: its checkpoint is ")
    assert f"the head's {mark[:12]}: copy the same files to every node" in message
    (other / "model.safetensors").write_bytes(b"short")
    assert said(NodeCheck(build_id(), str(other), mark, data)).startswith(f"{other}/model.safetensors: damaged or trun")
    (tmp_path / "file").touch()
    assert said(NodeCheck(build_id(), "", "", str(tmp_path / "file" / "data"))).startswith(
        f"data_dir: {tmp_path / 'file' / 'data'}: cannot be written (Not a directory): choose another"
    )


def test_a_data_directory_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(NodeError, match="cannot be written"):
        check_writable(Path("/proc/longreach"))


def test_addresses_of_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    six = SimpleNamespace(family=socket.AF_INET6, address="fe80::1")
    four = SimpleNamespace(family=socket.AF_INET, address="10.0.0.7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [six, four], "tun0": [six]})
    assert interface_address("eth0") == "10.0.0.7"
    with pytest.raises(NodeError, match=rf"^cluster.network_interface: eth1: not on {NODE}, which has eth0, tun0$"):
        interface_address("eth1")
    with pytest.raises(NodeError, match=rf"^cluster.network_interface: tun0: has no IPv4 address on {NODE}$"):
        interface_address("tun0")


def test_a_snapshot_may_be_in_the_cache_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "here"))
    at = Path("models--org--needle") / "snapshots" / ("a" * 40)
    check = NodeCheck(build_id(), str(tmp_path / "head" / at), fingerprint_of(NEEDLE), str(tmp_path / "data"))
    assert said(check) == (
        f"model.path: {tmp_path / 'head' / at}: no config.json there: copy it there, or run on this node: "
        f"hf download org/needle --revision {'a' * 40}"
    )
    (tmp_path / "here" / at).parent.mkdir(parents=True)
    (tmp_path / "here" / at).symlink_to(NEEDLE)
    check.run()
