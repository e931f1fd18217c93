"""Which kind of link connects two shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.stages.launcher import links_of, loaded_bytes
from protos.stage import stage_pb2 as pb
from protos.stage.messages import LoadProgress, ShardSpec, Span, StageAddress

NONE = Span(0, 0)
RUN_DIR = Path("/run/longreach-1")


def links(nodes: str, ranks: int = 1) -> list[pb.StartRequest]:
    """The links of every shard, stage by stage, of a pipeline whose stages are on these nodes."""
    shards = [
        ShardSpec(stage, len(nodes), rank, ranks, NONE, NONE, NONE, NONE, NONE, NONE)
        for stage in range(len(nodes))
        for rank in range(ranks)
    ]
    addresses = {
        (s.stage, s.rank): StageAddress(f"unix:s{s.stage}r{s.rank}", f"host:{s.stage}{s.rank}", nodes[s.stage], 1)
        for s in shards
    }
    return [pb.StartRequest(**links_of(shard, addresses, RUN_DIR, 3)) for shard in shards]


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


def test_loaded_bytes_are_of_what_is_stored():
    """A quantised shard counts its weights while it loads; the last message has its bytes."""
    latest = [LoadProgress(0, 0), LoadProgress(50, 200), LoadProgress(130, 130, True)]
    assert loaded_bytes([100, 120, 128], latest) == 0 + 30 + 128
