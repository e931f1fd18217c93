"""What `longreach quantize` refuses, and that nothing half-written stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.tools import quantize as module
from cluster.tools.assets import needle_dir
from cluster.tools.quantize import QuantizeOptions, quantize
from cluster.tools.torch_process import ProcessFailed
from protos.errors import UserError


def _silent(phase: str, done: int, total: int) -> None:
    raise AssertionError(phase)


def _write(module_name: str, request: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    (Path(request["target"]) / "config.json").write_text("{}")
    return {"weights": 10, "quantized": 8, "bytes": 5, "errors": [], "module": module_name, "request": request}


def test_the_copy_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_torch", _write)
    report = quantize(QuantizeOptions(needle_dir(), tmp_path / "out", 4, 64, ("experts",)), _silent)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").is_file()
    assert report["module"] == "workers.quant"
    request = report["request"]
    assert (request["bits"], request["group"], request["kinds"]) == (4, 64, ["experts"])
    assert (report["model"], report["target"]) == ("needle", "out")


@pytest.mark.parametrize("error", [UserError("bad"), ProcessFailed("died"), KeyboardInterrupt()])
def test_nothing_stays_of_a_copy_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_: str, request: dict[str, Any], __: Any) -> dict[str, Any]:
        (Path(request["target"]) / "part-00001").write_text("half")
        raise error

    monkeypatch.setattr(module, "run_torch", fail)
    with pytest.raises(type(error)):
        quantize(QuantizeOptions(needle_dir(), tmp_path / "out", 8), _silent)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 100}, "--group: 100: must be a multiple of 16"),
        ({"group": 0}, "--group: 0: must be a multiple of 16"),
        ({"kinds": ("experts", "heads")}, "--only: 'heads': must be some of attention, mlp, experts"),
        ({"source": Path("nowhere")}, "IN: nowhere: must be a model folder: there is no such folder"),
        ({"source": Path("model.gguf")}, "IN: model.gguf: a GGUF file: must be a folder of safetensors"),
        ({"target": Path("nowhere/out")}, "OUT: nowhere/out: its parent folder does not exist: create it first"),
        ({"target": needle_dir()}, "is there already: name a new folder"),
        (
            {"kinds": ("mlp",)},
            "--only: 'mlp': nothing of that is in this model: must be some of attention, experts, head",
        ),
        ({"kinds": ()}, "--only: '': nothing of that is in this model: must be some of attention, experts, head"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        quantize(QuantizeOptions(**{"source": needle_dir(), "target": tmp_path / "out", "bits": 4, **options}), _silent)
    assert message in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((needle_dir() / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"IN: .*source: is quantised already \(fp8\): use the checkpoint it was made"):
        quantize(QuantizeOptions(source, tmp_path / "out", 4), _silent)


def test_a_full_disk_is_named_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"OUT: .* are free on its disk: at least"):
        quantize(QuantizeOptions(needle_dir(), tmp_path / "out", 4), _silent)


def test_what_cannot_be_replaced_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a link to an empty folder nor an empty mounted disk, whose contents would be elsewhere."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "empty")
    for name in ("link", "empty"):
        with pytest.raises(UserError, match=f"OUT: .*{name}: is a link or a mounted disk: name a new folder, such as"):
            quantize(QuantizeOptions(needle_dir(), tmp_path / name, 4), _silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]
