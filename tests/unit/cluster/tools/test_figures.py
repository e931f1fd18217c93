"""What pictures share: ticks of token counts, plain numbers on logarithmic axes, files."""

from pathlib import Path

import pytest
from PIL import Image

from cluster.tools import figures
from cluster.tools.figures import empty_figure, has_matplotlib, log_axis, plain_axes, save_figure, titled, token_axis
from protos.errors import UserError


def labels(axis: object) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]  # type: ignore[attr-defined]


def test_token_axes_have_a_tick_a_count():
    axis = plain_axes(empty_figure(4, 3).subplots())
    axis.plot([4096, 131072], [1, 2])
    token_axis(axis, [131072, 4096, 4096, 16384], "tokens")
    assert labels(axis.xaxis) == ["4K", "16K", "128K"]
    assert axis.get_xlabel() == "tokens"


def test_logarithmic_axes_have_plain_numbers():
    figure = empty_figure(4, 3)
    axis = figure.subplots()
    axis.plot([0.01, 1.0], [0.5, 30.0])
    log_axis(axis, "x", percent=True)
    log_axis(axis, "y")
    figure.draw_without_rendering()
    assert {"1%", "2%", "50%", "100%"} <= set(labels(axis.xaxis))
    assert {"0.5", "1", "20"} <= set(labels(axis.yaxis))


def test_dense_axes_have_more_ticks():
    figure = empty_figure(4, 3)
    axis = figure.subplots()
    axis.plot([11.0, 21.0], [1.0, 2.0])
    log_axis(axis, "x", dense=True)
    figure.draw_without_rendering()
    assert {"12", "15", "20"} <= set(labels(axis.xaxis))


def test_pngs_have_a_palette(tmp_path: Path):
    figure = empty_figure(4, 3)
    figure.subplots().plot([1, 2], color="#b2182b")
    save_figure(figure, tmp_path / "x.png")
    picture = Image.open(tmp_path / "x.png")
    assert (picture.mode, picture.size) == ("P", (600, 450))
    assert (0xB2, 0x18, 0x2B) in {colour for _, colour in picture.convert("RGB").getcolors()}


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_files_are_what_their_names_say(kind: str, start: bytes, tmp_path: Path):
    figure = empty_figure(4, 3)
    titled(figure, "title", "details")
    save_figure(figure, tmp_path / f"x.{kind}")
    assert (tmp_path / f"x.{kind}").read_bytes().startswith(start)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    assert has_matplotlib()
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'longreach\\[eval\\]'"):
        empty_figure(1, 1)
