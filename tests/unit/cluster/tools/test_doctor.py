"""Findings of the doctor, each from a prepared machine; torch is never loaded here."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console

from cluster.tools import doctor
from cluster.tools.doctor import Check, Report

GOOD_FACTS = {"torch": "2", "threads": 2, "cpu_capability": "AVX512", "mkldnn": True, "amx": True, "gloo": True}


def printing(text: str, exit_code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({exit_code})"]


@pytest.mark.parametrize(
    ("command", "timeout", "status", "detail"),
    [
        (printing("noise\n" + json.dumps(GOOD_FACTS)), 30, "ok", "AMX"),
        (printing(json.dumps({**GOOD_FACTS, "mkldnn": False})), 30, "slow", "oneDNN"),
        (printing("", 3), 30, "error", "exit code 3"),
        (printing("not json"), 30, "error", "unexpected output"),
        (printing("[1]"), 30, "error", "unexpected output"),
        (printing("{}"), 30, "error", "unexpected output"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], 0.2, "error", "no answer within 0.2 s"),
        (["/nonexistent/python"], 1, "error", "cannot be started"),
    ],
)
def test_torch_in_its_own_process(command: list[str], timeout: float, status: str, detail: str) -> None:
    facts, check = doctor.torch_facts(command, timeout)
    assert (check.status, facts is None) == (status, status == "error")
    assert detail in check.detail
    assert "\n" not in check.detail


@pytest.mark.parametrize(
    ("facts", "status", "detail"),
    [
        ({"path": "avx512_bf16", "family": "avx512_bf16", "reason": ""}, "ok", "avx512_bf16, compiled here"),
        ({"path": "portable", "family": "portable", "reason": ""}, "slow", "portable, compiled here"),
        (
            {"path": None, "family": "torch-avx2", "reason": "no C++ compiler\nfound"}, "slow",
            "torch-avx2: PyTorch's, not compiled (no C++ compiler found)",
        ),
        ({"family": "amx"}, "error", 'unexpected output: {"family": "amx"}'),
    ],
)  # fmt: skip
def test_the_instruction_set_of_the_kernels(facts: dict[str, str], status: str, detail: str) -> None:
    check = doctor.check_kernels(printing(json.dumps(facts)), 60)
    assert (check.name, check.status, check.detail) == ("kernels", status, detail)
    assert bool(check.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("flags", "machine", "status", "reason"),
    [
        ({"amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2"}, "x86_64", "ok", ""),
        ({"avx512_bf16", "avx512f", "avx2"}, "x86_64", "slow", "no AMX"),
        ({"avx512f", "avx2"}, "x86_64", "slow", "no bfloat16"),
        ({"avx2"}, "x86_64", "slow", "no bfloat16"),
        (set(), "x86_64", "slow", "neither"),
        ({"asimd"}, "aarch64", "slow", "x86-64"),
        (None, "arm64", "ok", ""),
    ],
)
def test_cpu_features_say_why_it_is_slow(flags: set[str] | None, machine: str, status: str, reason: str) -> None:
    check = doctor.check_cpu_features(None if flags is None else {"flags": " ".join(flags)}, machine)
    assert check.status == status
    assert reason in check.advice


def test_arm_calls_its_flags_features() -> None:
    assert "avx2" in doctor.check_cpu_features({"Features": "fp avx2"}, "aarch64").detail


@pytest.mark.parametrize(
    ("content", "limit"), [("50000 100000", "0.5"), ("max 100000", None), ("garbage", None), ("", None)]
)
def test_container_core_limit(tmp_path: Path, content: str, limit: str | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    check = doctor.check_cores(tmp_path)
    assert (limit is not None) == ("container limit" in check.detail)
    if limit is not None:
        assert check.status == "slow"
        assert check.detail.endswith(f"container limit {limit}")


def test_old_container_core_limit(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert doctor.check_cores(tmp_path).detail.endswith("container limit 0.5")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert "container" not in doctor.check_cores(tmp_path).detail


def test_container_memory_limit(tmp_path: Path) -> None:
    assert "container" not in doctor.check_memory(tmp_path).detail
    (tmp_path / "memory.max").write_text(str(1 << 30))
    (tmp_path / "memory.current").write_text(str(1 << 29))
    check = doctor.check_memory(tmp_path)
    assert check.status == "error"
    assert "container limit 1.0 GiB" in check.detail
    (tmp_path / "memory.max").write_text("max\n")
    assert "container" not in doctor.check_memory(tmp_path).detail


def test_disk_looks_above_a_folder_that_is_not_there(tmp_path: Path) -> None:
    check = doctor.check_disk(tmp_path / "not" / "yet")
    assert check.detail.endswith(f"at {tmp_path}")
    (tmp_path / "file").touch()
    assert doctor.check_disk(tmp_path / "file").status == "error"
    assert not (tmp_path / "not").exists()


def test_the_cache_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert doctor.check_model_cache().detail.startswith(f"0 models in {tmp_path / 'hub'}, ")
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = doctor.check_model_cache()
    assert (check.name, check.status) == ("model cache", "ok")
    assert check.detail.startswith("1 models in ")
    assert check.detail.endswith(" GiB free, no downloads (HF_HUB_OFFLINE)")


def test_python_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_python((3, 10)).status == "error"
    assert doctor.check_python((3, 11)).status == "ok"
    assert doctor.check_packages().status == "ok"
    monkeypatch.setattr(doctor, "_PACKAGES", ("numpy", "no-such-package-here"))
    check = doctor.check_packages()
    assert (check.status, check.advice) == ("error", "pip install no-such-package-here")


@pytest.mark.parametrize(
    ("address", "status"),
    [("", "ok"), ("auto", "ok"), ("local", "ok"), ("nohost", "error"), ("h:x", "error"), ("h:70000", "error")],
)
def test_ray_address(address: str, status: str) -> None:
    assert doctor.check_ray(address).status == status


@pytest.mark.parametrize("fails", [True, False])
def test_ray_reachability(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    seen = []

    def connect(address: tuple[str, int], timeout: float) -> io.BytesIO:
        seen.append(address)
        if fails:
            raise ConnectionRefusedError("refused")
        return io.BytesIO()

    monkeypatch.setattr(doctor.socket, "create_connection", connect)
    assert doctor.check_ray("ray://[::1]:6379").status == ("missing" if fails else "ok")
    assert seen == [("::1", 6379)]


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [("NVIDIA H200, 143771 MiB, 143000 MiB\n", 0, "ok"), ("No devices were found", 6, "missing"), ("", 0, "missing")],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, output: str, code: int, status: str) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, output, "")
    )
    assert doctor.check_gpu().status == status
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_gpu().status == "missing"


def test_the_compiler_is_the_one_that_builds_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-c++")
    (tmp_path / "gcc").touch(0o755)  # no C++
    check = doctor.check_compiler()
    assert (check.status, check.detail) == ("slow", "no c++, g++, clang++ or CXX")
    assert "install g++" in check.advice
    for name in ("clang++", "my-c++"):
        (tmp_path / name).touch(0o755)
        assert doctor.check_compiler() == Check("compiler", "ok", str(tmp_path / name))


@pytest.mark.parametrize(
    ("capability", "count", "nccl", "triton", "status", "reason"),
    [
        ("9.0", 2, "2.29.3", "3.6.0", "ok", ""),
        ("12.0", 1, None, "3.6.0", "ok", ""),
        ("9.0", 2, None, "3.6.0", "slow", "no NCCL: a stage uses one GPU"),
        ("9.0", 1, "2.29.3", None, "slow", "no Triton: sparse prefill is a loop"),
        ("8.9", 1, "2.29.3", "3.6.0", "slow", "older than Hopper: experts have our kernels alone"),
        ("8.6", 1, "2.29.3", "3.6.0", "slow", "no e4m3: kv_cache.dtype: fp8 needs compute 8.9 (use int8)"),
        ("7.5", 1, "2.29.3", "3.6.0", "slow", "older than Ampere"),
    ],
)
def test_cuda_build(
    capability: str, count: int, nccl: str | None, triton: str | None, status: str, reason: str
) -> None:
    device = {"name": "H200", "capability": capability, "kernels": "torch-cuda-triton"}
    facts = {"devices": [device] * count, "cuda_build": "12.8", "nccl_version": nccl, "triton": triton}
    check = doctor.check_cuda_build(facts)
    assert check.status == status
    assert check.advice.startswith(reason)
    each = f"H200 (compute {capability}, kernels torch-cuda-triton)"
    assert check.detail == f"CUDA 12.8, NCCL {nccl or 'none'}, Triton {triton or 'none'}: {', '.join([each] * count)}"


def lines(
    capability: str, *, triton: str | None = "3.7.1", is_proven: bool = True, nccl: str | None = None
) -> list[str]:
    """Return the first words of all that is said of two such GPUs."""
    device = {"name": "GPU", "capability": capability, "kernels": "triton", "is_proven": is_proven}
    facts = {"devices": [device] * 2, "cuda_build": "12.8", "nccl_version": nccl, "triton": triton}
    check = doctor.check_cuda_build(facts)
    assert (check.status == "ok") == (not check.advice)
    return [line.partition(": ")[0].partition(",")[0] for line in check.advice.splitlines()]


def test_all_that_applies_to_a_gpu_is_said() -> None:
    unproven, no_nccl = "Triton's kernels are checked without GPUs", "no NCCL"
    assert lines("9.0", nccl="2.29.3") == []
    assert lines("9.0", is_proven=False) == [no_nccl, unproven]
    assert lines("8.9", is_proven=False) == [no_nccl, unproven, "older than Hopper"]
    assert lines("8.0", is_proven=False) == [no_nccl, unproven, "no e4m3", "older than Hopper"]
    assert lines("7.5", triton=None, is_proven=False) == ["older than Ampere", *["no Triton"] * 2, no_nccl, "no e4m3"]


def test_the_oldest_gpu_decides() -> None:
    devices = [{"name": "GPU", "capability": each, "kernels": "torch"} for each in ("10.0", "9.0", "8.0")]
    facts = {"devices": devices, "cuda_build": "12.8", "nccl_version": "2.29.3", "triton": "3.6.0"}
    assert "Hopper" in doctor.check_cuda_build(facts).advice


def test_a_gpu_that_torch_does_not_see() -> None:
    check = doctor.check_cuda_build({"devices": [], "cuda_build": None})
    assert (check.status, check.detail) == ("missing", "torch sees no GPU (CUDA build: none)")


def test_report_and_table() -> None:
    report = Report((Check("one", "slow", "[red]why[/red]", "do [this]\nand that"), Check("two", "missing", "gone")))
    assert report.ok
    assert not Report((*report.checks, Check("three", "error", "broken"))).ok
    assert json.loads(json.dumps(report.to_json()))["checks"][0]["advice"] == "do [this]\nand that"
    console = Console(file=io.StringIO(), width=100)
    doctor.render(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]why[/red]" in text
    assert "-> do [this]" in text
    assert "-> and that" in text
    assert "ready to run" in text


def test_the_whole_diagnosis_leaves_torch_out_of_this_process(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from cluster.tools.doctor import diagnose\n"
        f"report = diagnose(Path({str(tmp_path)!r}))\n"
        "print(json.dumps({'torch': 'torch' in sys.modules, **report.to_json()}))"
    )
    root = Path(doctor.__file__).parent.parent
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=580, check=True)
    found = json.loads(done.stdout)
    assert found["torch"] is False
    checks = {check["name"]: check for check in found["checks"]}
    assert {"python", "packages", "torch", "cores", "cpu features", "kernels", "memory", "disk", "gpu", "ray"} <= set(
        checks
    )
    assert checks["torch"]["status"] in ("ok", "slow")
    path = checks["kernels"]["detail"].partition(",")[0]
    assert path in ("portable", "amx") or path.startswith(("avx", "torch-"))
