"""Hidden states that leave from within the compiled layers: equal bits, whatever the link does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config.topology import plan_shards
from protos.stage.messages import SampledToken, ShardSpec, StepPlan
from tests.support.fakes.pipeline import InProcessSender
from tests.unit.workers.model.test_fused import CPU, PAGE, PAGES, SPEC, Sequences, weights_of
from workers.kernels.build import load
from workers.kv.paged import PagedKV
from workers.model import compiled as model
from workers.runner.model_runner import ModelRunner
from workers.stage.step import Stepper
from workers.transport import unix_link, unix_link_compiled
from workers.transport.collectives import SingleShard
from workers.transport.grpc_link import Inbox, LinkClosed, Sender, Source
from workers.transport.unix_link import NearInbox, NearSender

pytestmark = pytest.mark.skipif(
    model.path() is None, reason=f"no compiled kernels: {load().reason or 'this CPU has no AVX2'}"
)


def runner(shard: ShardSpec) -> ModelRunner:
    kv = PagedKV(shard.layers.size, shard.kv_heads.size, SPEC.head_dim, PAGES, PAGE, torch.bfloat16)
    kv._data.zero_()
    return ModelRunner(SPEC, shard, weights_of(SPEC, shard), kv, SingleShard(), CPU)


def plans() -> Iterator[StepPlan]:
    sequences = Sequences(3)
    steps = [(17,), (0, 45, 18), (1, 1), (1, 1, 1), (70,), (1, 1, 1)]
    for step, rows in enumerate([*steps, *[(1, 1, 1)] * 20]):
        yield replace(sequences.step(*rows), step=step)


def answers(ends: list[tuple[Source | None, Sender]], early: list[bool]) -> list[tuple[SampledToken, ...]]:
    """Two stages, each on a thread; `early` learns of every step whether its hidden states left by themselves."""
    first, last = (
        Stepper(runner(shard), source, sender, 20.0)
        for shard, (source, sender) in zip(plan_shards(SPEC, 2, 1), ends, strict=True)
    )
    usual = first._early
    first._early = lambda *arguments: _noted(usual(*arguments), early)  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(lambda: [first.step(plan) for plan in plans()])
        other = threads.submit(lambda: [last.step(plan)[0].samples for plan in plans()])
        one.result(60)
        return other.result(60)


def _noted(message: unix_link_compiled.Early | None, early: list[bool]) -> unix_link_compiled.Early | None:
    early.append(message is not None)
    return message


@pytest.fixture
def links(tmp_path: Path) -> Iterator[tuple[NearInbox, NearSender, NearInbox, NearSender]]:
    there = NearInbox(str(tmp_path / "there"))
    back = NearInbox(str(tmp_path / "back"), "tokens", "the last stage")
    made = there, NearSender(there._path), back, NearSender(back._path, depth=100)
    yield made
    for end in made:
        end.close()


def test_tokens_are_those_of_stages_in_one_process(links: tuple[NearInbox, NearSender, NearInbox, NearSender]):
    there, back = Inbox(depth=100), Inbox("tokens", "the last stage", depth=100)
    expected = answers([(back, InProcessSender(there)), (there, InProcessSender(back))], early := [])
    assert not any(early)
    inbox, sender, tokens, last = links
    found = answers([(tokens, sender), (inbox, last)], early := [])
    assert found == expected
    assert [len(samples) for samples in found[-20:]] == [3] * 20
    assert early[-20:] == [True] * 20
    assert not early[4], "too many rows for one call"


@pytest.mark.parametrize("taken", [0, 1, 63, 64, 65, 200])
def test_what_the_socket_does_not_take_at_once_follows(
    links: tuple[NearInbox, NearSender, NearInbox, NearSender], taken: int
):
    inbox, sender, *_ = links
    body = torch.arange(40)
    message = sender.early(0, body)
    assert message is not None
    data = unix_link._message(body, 0, message.seed)
    sender._socket.sendall(data[:taken])
    message.sent.value = taken
    sender.finish(message)
    sender.send(1, body + 1)
    for step in range(2):
        assert torch.equal(inbox.take(step, 5.0, (40,), torch.int64), body + step)


def test_an_early_message_to_nobody_ends_the_link(links: tuple[NearInbox, NearSender, NearInbox, NearSender]):
    inbox, sender, *_ = links
    sender.send(0, torch.zeros(3))
    inbox.take(0, 5.0, (3,), torch.float32)
    message = sender.early(1, torch.zeros(3))
    assert message is not None
    inbox.close()
    unix_link_compiled.send(message)
    with pytest.raises(LinkClosed, match=r"link to the next stage broke: .*Broken pipe"):
        sender.finish(message)
    assert sender.early(2, torch.zeros(3)) is None
    with pytest.raises(LinkClosed, match="link to the next stage broke"):
        sender.send(2, torch.zeros(3))


def test_nothing_overtakes_what_is_still_to_be_written(links: tuple[NearInbox, NearSender, NearInbox, NearSender]):
    inbox, sender, *_ = links
    large = torch.arange(1 << 20)
    sender.send(0, large)
    assert sender.early(1, torch.zeros(3)) is None
    sender.send(1, torch.ones(3))
    assert torch.equal(inbox.take(0, 5.0, large.shape, torch.int64), large)
    assert torch.equal(inbox.take(1, 5.0, (3,), torch.float32), torch.ones(3))
