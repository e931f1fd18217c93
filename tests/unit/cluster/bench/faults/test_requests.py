"""Messages that nobody would send."""

from __future__ import annotations

import random

from cluster.bench.faults.requests import filled, mutated
from protos.jobs import jobs_pb2 as pb


def test_messages_of_every_method_are_made() -> None:
    draw, sizes = random.Random(1), []
    for method in pb.DESCRIPTOR.services_by_name["Jobs"].methods:
        made = [filled(getattr(pb, method.input_type.name)(), draw).SerializeToString() for _ in range(20)]
        sizes.append(max(map(len, made)))
    assert sum(size > 0 for size in sizes) >= len(sizes) - 2, "all but those without fields"


def test_the_same_seed_gives_the_same_bytes() -> None:
    made = [mutated(b"abcdef" * 5, random.Random(seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1]
    assert len({mutated(b"abcdef" * 5, random.Random(seed)) for seed in range(50)}) > 30
