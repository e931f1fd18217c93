"""Where there is a compiler the kernels build: otherwise their tests would be skipped without anyone noticing."""

import os

import pytest

from workers.kernels.build import compiler, load


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler: the PyTorch twins serve")
@pytest.mark.skipif(os.environ.get("LONGREACH_KERNELS") == "off", reason="LONGREACH_KERNELS is off")
def test_kernels_build_where_there_is_a_compiler():
    found = load()
    assert found.library is not None, found.reason
    assert found.reason == ""
