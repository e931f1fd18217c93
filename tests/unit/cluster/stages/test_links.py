"""Which kind of link connects two shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.stages.links import links_of, reach_each_other
from protos.stage import stage_pb2 as pb
from protos.stage.messages import ShardSpec, Span, StageAddress

NONE = Span(0, 0)
RUN_DIR = Path("/run/longreach-1")


def links(nodes: str, ranks: int = 1, gpus: str = "") -> list[pb.StartRequest]:
    """The links of every shard, stage by stage, of a pipeline whose stages are on these nodes.

    `gpus` names that of each shard by a letter, "-" for none.
    """
    shards = [
        ShardSpec(stage, len(nodes), rank, ranks, NONE, NONE, NONE, NONE, NONE, NONE)
        for stage in range(len(nodes))
        for rank in range(ranks)
    ]
    addresses = {
        (s.stage, s.rank): StageAddress(f"unix:s{s.stage}r{s.rank}", f"host:{s.stage}{s.rank}", nodes[s.stage], 1)
        for s in shards
    }
    names = {(s.stage, s.rank): gpu.strip("-") for s, gpu in zip(shards, gpus or "-" * len(shards), strict=True)}
    return [pb.StartRequest(**links_of(shard, addresses, names, RUN_DIR, 3)) for shard in shards]


def groups(nodes: str, gpus: str, ranks: int = 1) -> list[tuple[str, str]]:
    """The names of the groups that each shard shares with the previous and the next stage."""
    made = links(nodes, ranks, gpus)
    return [(Path(link.upstream_group).stem, Path(link.downstream_group).stem) for link in made]


def test_a_stage_alone_has_no_links():
    assert links("a", ranks=2) == [pb.StartRequest()] * 2


def test_stages_of_one_node_form_a_ring_of_unix_sockets():
    for count in (2, 3):
        made = links("a" * count)
        assert [Path(link.downstream_socket).name for link in made] == [f"link{at}r0e3.sock" for at in range(count)]
        assert [link.upstream_socket for link in made] == [made[at - 1].downstream_socket for at in range(count)]
        assert all(Path(link.upstream_socket).parent == RUN_DIR and not link.downstream for link in made)


def test_shards_are_linked_with_their_rank():
    names = [Path(link.downstream_socket).name for link in links("aa", ranks=2)]
    assert names == ["link0r0e3.sock", "link0r1e3.sock", "link1r0e3.sock", "link1r1e3.sock"]


def test_nodes_are_linked_over_grpc():
    first, last = links("ab")
    assert first == pb.StartRequest(downstream="host:10")
    assert last == pb.StartRequest(downstream="host:00")


@pytest.mark.parametrize("nodes", ["aab", "aba", "aabb", "abab"])
def test_every_link_has_two_ends(nodes: str):
    made = links(nodes)
    for stage, link in enumerate(made):
        after = (stage + 1) % len(nodes)
        assert bool(link.downstream_socket) == (nodes[stage] == nodes[after])
        assert link.downstream == ("" if link.downstream_socket else f"host:{after}0")
        assert made[after].upstream_socket == link.downstream_socket


def test_gpus_of_a_node_are_linked_from_device_to_device():
    """Not the way back: the last stage sends tokens, which are on the host."""
    assert groups("aaa", "xyz") == [("", "link0r0e3"), ("link0r0e3", "link1r0e3"), ("link1r0e3", "")]
    assert groups("aa", "wxyz", ranks=2) == [("", "link0r0e3"), ("", "link0r1e3"), ("link0r0e3", ""), ("link0r1e3", "")]
    assert all(Path(link.upstream_socket).stem.endswith("e3") for link in links("aaa", gpus="xyz")), "which announces"


@pytest.mark.parametrize(
    ("nodes", "gpus"), [("ab", "xy"), ("aa", "xx"), ("aa", "x-"), ("aa", "-x"), ("aa", "--")],
    ids=["two nodes", "one GPU", "to a CPU", "from a CPU", "no GPU"],
)  # fmt: skip
def test_others_are_not(nodes: str, gpus: str):
    assert groups(nodes, gpus) == [("", ""), ("", "")]
    assert links(nodes, gpus=gpus) == links(nodes)


def test_part_of_a_pipeline_may_be():
    assert groups("aab", "xyz") == [("", "link0r0e3"), ("link0r0e3", ""), ("", "")]


def test_a_gpu_does_not_reach_itself():
    assert reach_each_other("GPU-1", "GPU-2")
    assert not reach_each_other("GPU-1", "GPU-1")
    assert not reach_each_other("", "")
