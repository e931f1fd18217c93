"""What both kinds of links say when something else came than what was due."""

import pytest
import torch

from workers.transport.grpc_link import GrpcInbox, GrpcSender
from workers.transport.interface import Inbox, LinkClosed, Sender, check_due, overdue
from workers.transport.unix_link import UnixInbox, UnixSender


def test_what_is_due_passes():
    tensor = torch.zeros(2, 3)
    assert check_due("tokens", 4, tensor, 4, (2, 3), torch.float32) is tensor


@pytest.mark.parametrize(
    ("received", "shape", "dtype", "error"),
    [
        (5, [2, 3], torch.float32, "tokens of step 5 came where step 4 was due"),
        (4, [3, 2], torch.float32, r"are torch.float32 \[2, 3\] where torch.float32 \[3, 2\] were due"),
        (4, [6], torch.float32, r"tokens of step 4 are torch.float32 \[2, 3\] where torch.float32 \[6\] were due"),
        (4, [2, 3], torch.int64, r"tokens of step 4 are torch.float32 \[2, 3\] where torch.int64 \[2, 3\] were due"),
    ],
)
def test_anything_else_is_an_error(received: int, shape: list[int], dtype: torch.dtype, error: str):
    with pytest.raises(LinkClosed, match=error):
        check_due("tokens", received, torch.zeros(2, 3), 4, shape, dtype)


def test_a_tensor_that_does_not_come():
    assert str(overdue("activations", 4, 0.2)) == "activations of step 4 did not come within 0.2 s"


def test_both_kinds_of_links_are_links():
    ends: tuple[type[Inbox], type[Inbox], type[Sender], type[Sender]] = (GrpcInbox, UnixInbox, GrpcSender, UnixSender)
    assert len(ends) == 4
