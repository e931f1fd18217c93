"""Diagnosis of this machine: what it has, what is missing, what will be slow and why."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.common.addresses import split_address
from cluster.common.text_format import escape_controls, one_line
from cluster.hub.cache import cache_folder, is_offline
from cluster.hub.names import HubName
from protos.node.environment import COMPILERS, compiler, cpu_facts, usable_cores, version_of

Status = Literal["ok", "slow", "missing", "error"]
GIB = 1 << 30
_PACKAGES = (
    "ray", "torch", "safetensors", "tokenizers", "grpcio", "protobuf", "pydantic", "jinja2", "numpy", "ruamel.yaml",
    "huggingface_hub",
)  # fmt: skip
_CPU_FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")
_MIN_MEMORY = 2 * GIB  # the head, Ray and one worker with the demo model
_MIN_SHM = GIB // 4  # Ray's object store only carries small control messages here
_MIN_DISK = GIB
_MIN_OPEN_FILES = 4096
_COLOURS = {"ok": "green", "slow": "yellow", "missing": "yellow", "error": "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. Only `error` keeps Longreach from running; `missing` is an option that is not there.

    `advice` has a line for each thing to know.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order in which they are shown."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.status != "error" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return `{"ok": bool, "checks": [{"name", "status", "detail", "advice"}]}`."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def diagnose(
    data_dir: Path | None = None, *, torch_timeout: float = 120.0, kernels_timeout: float = 400.0
) -> Report:  # fmt: skip
    """Check this machine; takes seconds, most of them for torch in a process of its own.

    Nothing is changed, but kernels that were not built yet are built and kept, which takes a minute.

    Args:
        data_dir: where jobs and KV will be stored; default: the current folder.
    """
    command = [sys.executable, "-m", "workers.doctor"]
    facts, torch_check = torch_facts(command, torch_timeout)
    gpu = check_gpu()
    return Report(
        (
            check_python(sys.version_info[:2]),
            check_packages(),
            torch_check,
            *([check_communication(facts)] if facts else []),
            check_cores(Path("/sys/fs/cgroup")),
            check_cpu_features(cpu_facts(), platform.machine()),
            *([check_kernels([*command, "kernels"], kernels_timeout)] if facts else []),
            check_memory(Path("/sys/fs/cgroup")),
            check_disk(data_dir or Path.cwd()),
            check_model_cache(),
            check_shm(Path("/dev/shm")),
            gpu,
            *([check_cuda_build(facts)] if facts and gpu.status == "ok" else []),
            check_compiler(),
            check_ray(os.environ.get("RAY_ADDRESS", "")),
            check_open_files(),
        )
    )


def render(report: Report, console: Console) -> None:
    """Print the report as a table, advice under its finding."""
    table = Table(title="longreach doctor", title_justify="left")
    for column in ("check", "status", "finding"):
        table.add_column(column, overflow="fold")
    for check in report.checks:
        finding = "\n-> ".join([check.detail, *check.advice.splitlines()])
        table.add_row(check.name, f"[{_COLOURS[check.status]}]{check.status}[/]", escape(escape_controls(finding)))
    console.print(table)
    console.print("ready to run" if report.ok else "not ready: see the errors above")


def judge(name: str, detail: str, *rules: tuple[object, Status, str]) -> Check:
    """Return the finding of the first of `rules` (applies, status, advice) that applies, else `ok`."""
    for applies, status, advice in rules:
        if applies:
            return Check(name, status, detail, advice)
    return Check(name, "ok", detail)


def check_python(version: tuple[int, ...]) -> Check:
    name = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "error", name, "install Python 3.11 or newer")
    return Check("python", "ok", f"{name} ({sys.executable})")


def check_packages() -> Check:
    """Report the versions of what Longreach depends on, from their metadata: nothing is imported."""
    versions = {name: version_of(name) for name in _PACKAGES}
    absent = [name for name, version in versions.items() if version is None]
    if absent:
        return Check("packages", "error", f"not installed: {', '.join(absent)}", f"pip install {' '.join(absent)}")
    return Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def torch_facts(command: list[str], timeout: float) -> tuple[dict[str, Any] | None, Check]:
    """Run `workers.doctor`; return its facts and a finding, no facts if it fails, hangs or prints something else."""
    facts = _ask(command, timeout, "torch", "threads", "cpu_capability")
    if isinstance(facts, str):
        advice = f"run `{Path(command[0]).name} -m workers.doctor` to see why; reinstall torch"
        return None, Check("torch", "error", facts, advice)
    detail = f"{facts['torch']}, {facts['threads']} threads, {facts['cpu_capability']}"
    bf16 = "AMX" if facts.get("amx") else "AVX-512" if facts.get("avx512_bf16") else "no instructions"
    if not facts.get("mkldnn"):
        return facts, Check("torch", "slow", f"{detail}, without oneDNN", "install torch from pytorch.org")
    return facts, Check("torch", "ok", f"{detail}, bfloat16 on CPU: {bf16}")


def check_kernels(command: list[str], timeout: float) -> Check:
    """Run `workers.doctor kernels`; report the instruction set that `device: cpu` computes with."""
    facts = _ask(command, timeout, "path", "family", "reason")
    if isinstance(facts, str):
        return Check("kernels", "error", facts, "see why: python -m workers.doctor kernels")
    if facts["path"] is None:
        without = f"{facts['family']}: PyTorch's, not compiled ({one_line(facts['reason'], 200)})"
        return Check("kernels", "slow", without, "slower: install g++, or unset LONGREACH_KERNELS")
    if facts["path"] == "portable":
        return Check("kernels", "slow", "portable, compiled here", "no vector instructions: for trying out only")
    return Check("kernels", "ok", f"{facts['path']}, compiled here")


def _ask(command: list[str], timeout: float, *keys: str) -> dict[str, Any] | str:
    """Return the JSON object with these keys that a command prints last, or why there is none."""
    root = Path(__file__).resolve().parents[2]  # where `python -m` finds it
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=root)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:g} s"
    except OSError as error:
        return f"cannot be started: {error}"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        return f"exit code {done.returncode}: {reason}"
    try:
        facts = json.loads(lines[-1])
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or any(key not in facts for key in keys):
        return f"unexpected output: {lines[-1][:100]}"
    return facts


def check_communication(facts: Mapping[str, Any]) -> Check:
    """Report the collective libraries of torch."""
    have = [name for name in ("gloo", "nccl") if facts.get(name)]
    if "gloo" not in have:
        return Check("collectives", "missing", "torch has no gloo", "shards of a stage on CPU need it")
    return Check("collectives", "ok", ", ".join(have))


def check_cores(cgroup: Path) -> Check:
    """Report the cores of the machine, of this process (affinity), and the container's quota in cores."""
    usable, quota = usable_cores(), _cgroup_cores(cgroup)
    detail = f"{os.cpu_count() or 1} logical, {usable} usable by this process"
    if quota is not None:
        detail += f", container limit {quota:g}"
    limit = usable if quota is None else quota
    return judge(
        "cores", detail,
        (limit < usable, "slow", f"threads beyond the limit are throttled: use at most {max(1, int(limit))}"),
        (usable < 4, "slow", "prefill on CPU scales with cores: expect the demo model, not 30B"),
    )  # fmt: skip


def check_cpu_features(facts: Mapping[str, str] | None, machine: str) -> Check:
    if facts is None:
        return Check("cpu features", "ok", f"{machine}: not known on {platform.system()}")
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    known = ", ".join(flag for flag in _CPU_FLAGS if flag in flags) or "no vector extension known here"
    x86 = machine in ("x86_64", "AMD64")
    return judge(
        "cpu features", f"{machine}: {known}",
        (not x86, "slow", "only x86-64 has tuned CPU kernels: others use portable code"),
        ({"amx_bf16", "amx_tile"} <= flags, "ok", ""),
        ("avx512_bf16" in flags, "slow", "no AMX: bfloat16 products run on AVX-512 vectors, not on tiles"),
        (flags & {"avx512f", "avx2"}, "slow", "no bfloat16 instructions: products are converted to float32 first"),
        (True, "slow", "neither AVX2 nor AVX-512: portable code, for trying out only"),
    )  # fmt: skip


def check_memory(cgroup: Path) -> Check:
    memory = psutil.virtual_memory()
    limit = min(_numbers(cgroup / "memory.max"), default=memory.total)
    detail = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f}"
    available = memory.available
    if limit < memory.total:
        available = min(available, limit - sum(_numbers(cgroup / "memory.current")))
        detail += f", container limit {limit / GIB:.1f} GiB"
    too_little = f"at least {_MIN_MEMORY / GIB:g} GiB must be free"
    return judge("memory", detail, (available < _MIN_MEMORY, "error", too_little))


def check_disk(data_dir: Path) -> Check:
    """Report the free space at `data_dir`, or at the nearest folder above it that exists."""
    folder = data_dir.absolute()
    while not os.path.exists(folder):  # unlike Path.exists, False where a parent may not be read
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Check("disk", "error", f"{folder}: not a writable folder", "choose another data_dir")
    free = shutil.disk_usage(folder).free
    too_little = f"stored KV and jobs need at least {_MIN_DISK / GIB:g} GiB"
    return judge("disk", f"{free / GIB:.1f} GiB free at {folder}", (free < _MIN_DISK, "error", too_little))


def check_model_cache() -> Check:
    """Report where models that are named as on a hub are kept, and whether missing ones may be downloaded."""
    folder = cache_folder(HubName("huggingface", "any/model"))
    number = sum(1 for _ in folder.glob("models--*"))
    existing = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    detail = f"{number} models in {folder}, {shutil.disk_usage(existing).free / GIB:.1f} GiB free"
    return Check("model cache", "ok", detail + (", no downloads (HF_HUB_OFFLINE)" if is_offline() else ""))


def check_shm(path: Path) -> Check:
    if not path.is_dir():
        return Check("shared memory", "ok", f"no {path} on {platform.system()}")
    size = shutil.disk_usage(path).total
    advice = "Ray falls back to the disk: run containers with --shm-size=1g"
    return judge("shared memory", f"{size / GIB:.2f} GiB at {path}", (size < _MIN_SHM, "slow", advice))


def check_gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    advice = "fine for configurations with device: cpu"
    if tool is None:
        return Check("gpu", "missing", "no nvidia-smi", advice)
    query = [tool, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("gpu", "missing", f"nvidia-smi does not answer: {str(error)[:100]}", advice)
    gpus = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0 or not gpus:
        return Check("gpu", "missing", f"nvidia-smi: {one_line(done.stdout + done.stderr, 150)}", advice)
    return Check("gpu", "ok", "; ".join(gpus))


def check_cuda_build(facts: Mapping[str, Any]) -> Check:
    """Report whether torch can use the GPU that nvidia-smi shows, its libraries and kernels, and all that is slow."""
    build, devices = facts.get("cuda_build") or "none", facts.get("devices", [])
    if not devices:
        return Check("cuda", "missing", f"torch sees no GPU (CUDA build: {build})", "install torch with CUDA to use it")
    triton, nccl = facts.get("triton"), facts.get("nccl_version")
    found = ", ".join(
        f"{device['name']} (compute {device['capability']}, kernels {device['kernels']})" for device in devices
    )
    oldest = min(tuple(map(int, device["capability"].split("."))) for device in devices)
    rules = (
        (oldest < (8, 0), "older than Ampere: bfloat16 is emulated, fused attention is not there"),
        (not triton, "no Triton: sparse prefill is a loop on the host, hours for long prompts: install triton"),
        (not triton, "no Triton: experts are multiplied one by one, and the host waits for each layer"),
        (not nccl and len(devices) > 1, "no NCCL: a stage uses one GPU, stages exchange data over the host"),
        (
            triton and not all(device.get("is_proven", True) for device in devices),
            "Triton's kernels are checked without GPUs, and were never run on such a one: pytest tests/gpu tells",
        ),
        (oldest < (8, 9), "no e4m3: kv_cache.dtype: fp8 needs compute 8.9 (use int8), products unpack FP8 weights"),
        (triton and (8, 0) <= oldest < (9, 0), "older than Hopper: experts have our kernels alone, not PyTorch's"),
    )
    advice = "\n".join(line for applies, line in rules if applies)
    detail = f"CUDA {build}, NCCL {nccl or 'none'}, Triton {triton or 'none'}: {found}"
    return Check("cuda", "slow" if advice else "ok", detail, advice)


def check_compiler() -> Check:
    """Report the compiler that builds the CPU kernels at their first use."""
    if (path := compiler()) is not None:
        return Check("compiler", "ok", path)
    advice = "device: cpu runs PyTorch's slower kernels: install g++"
    return Check("compiler", "slow", f"no {', '.join(COMPILERS)} or CXX", advice)


def check_ray(address: str) -> Check:
    """Report Ray's version and, with RAY_ADDRESS set, whether its port accepts connections (nothing is sent)."""
    if (version := version_of("ray")) is None:
        return Check("ray", "error", "not installed", "pip install ray")
    if not address or address in ("auto", "local"):
        return Check("ray", "ok", f"{version}, no RAY_ADDRESS: a local cluster will be started")
    target = split_address(address.removeprefix("ray://"))
    if target is None:
        return Check("ray", "error", f"RAY_ADDRESS {address!r}", "must be host:port, auto or local")
    try:
        socket.create_connection(target, timeout=5).close()
    except OSError as error:
        detail = f"{version}, no cluster at {address} (RAY_ADDRESS): {error}"
        return Check("ray", "missing", detail, "matters only for cluster.address: auto; start it, or unset RAY_ADDRESS")
    return Check("ray", "ok", f"{version}, cluster reachable at {address}")


def check_open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = ["unlimited" if value == resource.RLIM_INFINITY else str(value) for value in (soft, hard)]
    few = soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES
    advice = f"many clients may be refused: ulimit -n {_MIN_OPEN_FILES}"
    return judge("open files", f"{limits[0]} (hard limit {limits[1]})", (few, "slow", advice))


def _cgroup_cores(cgroup: Path) -> float | None:
    """Return the CPU quota in cores (cgroup 2: `cpu.max`; cgroup 1: `cpu/cpu.cfs_*`), None without one."""
    old = [cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    match _numbers(cgroup / "cpu.max") or [number for path in old for number in _numbers(path)]:
        case [quota, period] if quota > 0 and period > 0:
            return quota / period
    return None


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file; none where it cannot be read or says "max", which is no limit."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
