"""Which fused kernel is called, and that its results mean the same: output and log-sum-exp."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from workers.attention import cards, torch_backend
from workers.attention import flash as module
from workers.attention.flash import compute_family, flash, has_fast_kernel, supports_flash_attn
from workers.attention.plan import AttentionPlan, Queries
from workers.bench.cases.attention import attend_reference
from workers.kernels.build import kernel_family
from workers.kv.paged import PagedKV, PageTable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = (1, 17, 67, 193)
DIM = 32


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    """The contract of flash-attn's function of this name in plain PyTorch: `[B, S, H, D]`, causal from the end."""
    assert dropout_p == softcap == 0.0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    batch, rows, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    assert k.shape == v.shape == (batch, keys, kv_heads, dim)
    group = heads // kv_heads
    wide_k, wide_v = (side.float().repeat_interleave(group, dim=2) for side in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), wide_k) * (softmax_scale or dim**-0.5)
    if causal:
        hidden = torch.ones(rows, keys, dtype=torch.bool).triu(1 + keys - rows)
        logits = logits.masked_fill(hidden, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), wide_v).to(q.dtype)
    return (out, logits.logsumexp(-1), None) if return_attn_probs else out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flash-attn as above, on a GPU that takes it."""
    fake = ModuleType("flash_attn")
    fake.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module._flash_attn_func.cache_clear()
    yield
    module._flash_attn_func.cache_clear()


@pytest.fixture
def chosen(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn as above is called on the CPU too."""
    monkeypatch.setattr(module, "supports_flash_attn", lambda device, dtype, dim: True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("device", "dtype", "dim", "expected"),
    [
        (CUDA, torch.bfloat16, 128, True),
        (CUDA, torch.float16, 256, True),
        (CUDA, torch.float32, 128, False),
        (CUDA, torch.bfloat16, 264, False),
        (CPU, torch.bfloat16, 128, False),
        (CPU, torch.float32, 128, False),
    ],
)
def test_flash_attn_is_chosen_where_it_can_run(
    device: torch.device, dtype: torch.dtype, dim: int, expected: bool
) -> None:
    assert supports_flash_attn(device, dtype, dim) is expected


@pytest.mark.usefixtures("installed")
def test_kv_of_every_library_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_family(CUDA, torch.bfloat16, 128) == "cuda-9.0-flash-attn"
    assert compute_family(CUDA, torch.float32, 128) == "cuda-9.0", "one kernel of PyTorch computes"
    assert compute_family(CPU, torch.bfloat16, 128) == kernel_family(CPU)
    monkeypatch.setattr(module, "_cudnn_works", lambda *_: True)
    assert compute_family(CUDA, torch.float16, 264) == "cuda-9.0-cudnn", "flash-attn takes no such heads"
    with cards.using(cards.CUDNN):
        assert compute_family(CUDA, torch.bfloat16, 128) == "cuda-9.0-cudnn"
    with cards.using(cards.FLASH):
        assert compute_family(CUDA, torch.bfloat16, 128) == "cuda-9.0-flash"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    module._flash_attn_func.cache_clear()
    assert compute_family(CUDA, torch.bfloat16, 128) == "cuda-9.0-cudnn"
    monkeypatch.setattr(module, "_cudnn_works", lambda *_: False)
    assert compute_family(CUDA, torch.bfloat16, 128) == "cuda-9.0-flash"


@pytest.mark.usefixtures("installed")
def test_an_old_gpu_has_pytorchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not supports_flash_attn(CUDA, torch.bfloat16, 128)


@pytest.mark.usefixtures("installed")
def test_without_flash_attn_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(sys, "meta_path", [])
    assert not supports_flash_attn(CUDA, torch.bfloat16, 128)
    assert not caplog.records


@pytest.mark.usefixtures("installed")
def test_a_broken_installation_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_func")
    with caplog.at_level(logging.WARNING):
        assert not supports_flash_attn(CUDA, torch.bfloat16, 128)
        assert not supports_flash_attn(CUDA, torch.bfloat16, 128)
    (record,) = caplog.records
    assert record.getMessage().startswith("flash-attn is installed but cannot be imported (cannot import name")


class Cudnn:
    """The contract of PyTorch's operator for cuDNN in plain PyTorch, or an error of it."""

    def __init__(self, error: float = 0.0, refuses: str = "") -> None:
        self.error, self.refuses = error, refuses

    def _scaled_dot_product_cudnn_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: None, compute_log_sumexp: bool,
        dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
        assert compute_log_sumexp
        if self.refuses:
            raise RuntimeError(self.refuses)
        out, lse = exact(q[0].transpose(0, 1), k[0], v[0], is_causal, scale)
        return out.transpose(0, 1)[None].to(q.dtype), (lse + self.error).float().T[None, ..., None], None


@pytest.mark.parametrize(
    ("operator", "expected"),
    [(Cudnn(), True), (Cudnn(error=0.7), False), (Cudnn(refuses="no plan\nat line 7"), False)],
)
def test_cudnn_is_used_where_it_agrees(operator: Cudnn, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "aten", operator)
    works = module._cudnn_works.__wrapped__
    assert works(CPU, torch.bfloat16, DIM) is expected


@pytest.mark.parametrize(
    ("named", "works", "called"),
    [
        (None, True, "cudnn"), (None, False, "flash"), ("own", True, "cudnn"), ("flash", True, "flash"),
        ("cudnn", False, "flash"), ("flash-attn", True, "cudnn"),
    ],
)  # fmt: skip
def test_the_family_names_the_operator_that_is_called(
    named: str | None, works: bool, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without content; flash-attn is not installed."""
    calls = []

    class Operators:
        def _scaled_dot_product_flash_attention(self, q: torch.Tensor, *_: object, scale: float) -> object:
            calls.append("flash")
            return q, q[..., 0], None

        def _scaled_dot_product_cudnn_attention(self, q: torch.Tensor, *_: object, scale: float) -> object:
            calls.append("cudnn")
            return q, q[..., 0], None

    monkeypatch.setattr(torch.ops, "aten", Operators())
    monkeypatch.setattr(cards, "dense_library", lambda *_: named)
    monkeypatch.setattr(module, "_cudnn_works", lambda *_: works)
    monkeypatch.setattr(module, "_flash_attn_func", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q, k, v = torch.empty(3, 8, 8, DIM, dtype=torch.bfloat16, device="meta")
    flash(q, k, v, False, 0.25)
    assert calls == [called]
    assert compute_family(CUDA, torch.bfloat16, DIM) == f"cuda-9.0-{called}"


def test_pytorch_here_has_no_cudnn() -> None:
    assert not module._cudnn_works(CPU, torch.bfloat16, DIM)


@pytest.mark.usefixtures("installed")
def test_kernels_made_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cudnn_works", lambda *_: True)
    assert has_fast_kernel(CUDA, torch.bfloat16, 264), "cuDNN's, where flash-attn takes no such heads"
    assert not has_fast_kernel(CUDA, torch.float32, 128)
    assert not has_fast_kernel(CPU, torch.bfloat16, 128)
    monkeypatch.setattr(module, "_cudnn_works", lambda *_: False)
    assert not has_fast_kernel(CUDA, torch.bfloat16, 264)
    assert has_fast_kernel(CUDA, torch.bfloat16, 128)


def random_rows(rows: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries `[T, H, D]` with the strides of a slice, keys and values `[K, n, D]` with those of a cache."""
    generator = torch.Generator().manual_seed(rows + keys)
    q = torch.randn(rows, heads + 3, DIM, generator=generator)[:, :heads]
    sides = [torch.randn(kv_heads, keys + 5, DIM, generator=generator)[:, :keys] for _ in range(2)]
    return [q.to(dtype), *(side.to(dtype) for side in sides)]


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // k.shape[0]
    k, v = (side.double().repeat_interleave(group, dim=0) for side in (k, v))
    logits = torch.einsum("qhd,hkd->hqk", q.double(), k) * scale
    if causal:
        seen = torch.arange(k.shape[1]) <= torch.arange(q.shape[0])[:, None] + k.shape[1] - q.shape[0]
        logits = logits.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,hkd->qhd", logits.softmax(-1), v), logits.logsumexp(-1).T


def check(rows: int, keys: int, heads: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    inputs = random_rows(rows, keys, *heads, dtype)
    out, lse = flash(*inputs, causal, 0.25)
    wanted, wanted_lse = exact(*inputs, causal, 0.25)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5 if dtype == torch.float32 else 2e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("rows", SIZES)
def test_pytorchs_kernels(rows: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(rows, rows, heads, True, dtype)
    for keys in SIZES:
        check(rows, keys, heads, False, dtype)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("rows", SIZES)
def test_the_call_of_flash_attn(rows: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for keys in SIZES:
        check(rows, keys, heads, False, dtype)
        if keys >= rows:
            check(rows, keys, heads, True, dtype)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("distance", [0, 256])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 17), (64, 67), (300, 193), (500, 1)])
def test_plans_by_flash_attn(start: int, rows: int, distance: int) -> None:
    """Several calls and their joined log-sum-exps, over pages in disorder."""
    generator = torch.Generator().manual_seed(start + rows)
    context, page = start + rows, 16
    pages = -(-context // page)
    table = PageTable(page)
    table.append(torch.randperm(pages, generator=generator).tolist())
    k, v = torch.randn(2, context, 2, DIM, generator=generator)
    q = Queries(*torch.randn(3, rows, 4, DIM, generator=generator))
    kv = PagedKV(1, 2, DIM, pages, page, torch.float32)
    kv.write(0, table.runs(0, context), k, v)
    plan, scales = AttentionPlan(start, rows, distance), torch.full((rows,), 0.2)
    got = torch_backend.attend(q, kv.layer(0), table, plan, scales)
    torch.testing.assert_close(got, attend_reference(q, k, v, plan, scales), atol=4e-6, rtol=4e-6)
