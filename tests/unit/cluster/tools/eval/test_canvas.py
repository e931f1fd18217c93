"""Empty figures."""

from __future__ import annotations

import pytest

from cluster.tools.eval import canvas
from cluster.tools.eval.canvas import empty_figure, has_matplotlib
from protos.errors import UserError


def test_there_is_matplotlib_for_tests() -> None:
    assert has_matplotlib()
    assert tuple(empty_figure(3.0, 2.0).get_size_inches()) == (3.0, 2.0)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs matplotlib: pip install 'longreach\[eval\]'"):
        empty_figure(3.0, 2.0)
