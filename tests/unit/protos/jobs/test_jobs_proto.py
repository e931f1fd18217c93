"""Another package's jobs.proto in the same process, loaded before ours or after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from protos.jobs import jobs_pb2 as pb
from tests.support.paths import ROOT

FOREIGN = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="jobs.proto", package="elsewhere", syntax="proto3")
message = file.message_type.add(name="Job")
message.field.add(name="salary", number=1, type=5, label=1)
descriptor_pool.Default().Add(file)
"""
OURS = "from protos.jobs import jobs_pb2 as pb\nassert pb.Job(id='job_1').id == 'job_1'\n"
CHECK = """
pool = descriptor_pool.Default()
assert pool.FindMessageTypeByName("elsewhere.Job").fields[0].name == "salary"
assert pool.FindMessageTypeByName("longreach.jobs.v1.Job") is pb.Job.DESCRIPTOR
"""


@pytest.mark.parametrize("code", [FOREIGN + OURS, OURS + FOREIGN], ids=["foreign first", "ours first"])
def test_two_files_of_one_name_share_a_process(code: str) -> None:
    subprocess.run([sys.executable, "-c", code + CHECK], cwd=ROOT, check=True)


def test_our_file_is_registered_under_a_path_of_our_own() -> None:
    assert pb.DESCRIPTOR.name == "longreach/jobs/v1/jobs.proto"
    assert pb.DESCRIPTOR.package == "longreach.jobs.v1"
