"""Which kind of link connects two shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from protos.stage.messages import ShardSpec, StageAddress


def links_of(
    shard: ShardSpec, addresses: Mapping[tuple[int, int], StageAddress], gpus: Mapping[tuple[int, int], str],
    run_dir: Path, epoch: int,
) -> dict[str, str]:  # fmt: skip
    """Return the fields of a StartRequest that say how a shard is linked to the same rank of its neighbours.

    Stages form a ring: the last one sends its tokens to the first. Shards of one node share a Unix socket in `run_dir`,
    which every node has; others are linked over gRPC with TLS. Hidden states between two GPUs of a node go from one to
    the other; between nodes they do not, as NCCL would send them unencrypted.

    Args:
        addresses, gpus: of all shards by stage and rank.
    """
    if shard.num_stages == 1:
        return {}

    def between(stage: int) -> tuple[str, str]:
        """Return the paths of socket and group between a stage and the one after it; empty if there is none."""
        ends = (stage, shard.rank), ((stage + 1) % shard.num_stages, shard.rank)
        if addresses[ends[0]].node != addresses[ends[1]].node:
            return "", ""
        name = f"link{stage}r{shard.rank}e{epoch}"
        is_direct = stage + 1 < shard.num_stages and reach_each_other(*(gpus.get(end, "") for end in ends))
        return str(run_dir / f"{name}.sock"), str(run_dir / f"{name}.store") if is_direct else ""

    before, after = (shard.stage - 1) % shard.num_stages, (shard.stage + 1) % shard.num_stages
    links: dict[str, str] = {}
    links["upstream_socket"], links["upstream_group"] = between(before)
    links["downstream_socket"], links["downstream_group"] = between(shard.stage)
    return links if links["downstream_socket"] else links | {"downstream": addresses[after, shard.rank].tcp}


def reach_each_other(one: str, other: str) -> bool:
    """Return whether tensors go from device to device between shards of a node, whose GPUs have these identifiers.

    Two shards on one GPU cannot: NCCL refuses it.
    """
    return bool(one and other) and one != other
