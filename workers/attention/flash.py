"""One call of a fused attention kernel over contiguous keys: that of flash-attn where it can run, else PyTorch's.

flash-attn (the extra `cuda`) takes float16 and bfloat16 on CUDA devices from Ampere on. It reads the keys of a KV head
once for all query heads of its group, where PyTorch's CUDA operators want as many KV heads as query heads.

PyTorch has two for 16-bit types: that of cuDNN is the faster one on Hopper, and is used where it agrees with plain
PyTorch on a small input. Where a card was measured, `cards` says which of all these is used.

Limits: none of the CUDA paths has been run on a GPU yet. The call of flash-attn is tested on the CPU against plain
PyTorch code with the documented contract of `flash_attn_func` (2.1 or later).

Legend: `T` rows, `n` keys, `H` query heads, `K` KV heads, `G = H // K`, `D` head dim.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from workers.attention import cards
from workers.kernels.build import kernel_family

_AMPERE = (8, 0)  # compute capability
_MAX_DIM = 256
_FOLDED_ROWS = 64  # `T * G` up to which the query heads of a group are folded into rows

_log = logging.getLogger(__name__)


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention of rows over keys.

    Args:
        q: `[T, H, D]`, unit stride in `D`.
        k, v: `[K, n, D]`, unit stride in `D`.
        causal: row `i` sees keys `0 .. n - T + i`: the last row sees the last key. PyTorch's kernels align the first
            row with the first key, and are called with `T == n` only.
        scale: the factor on the logits.

    Returns:
        The output `[T, H, D]` in the type of `q`, and the natural log-sum-exp of the scaled logits `[T, H]` in float32.
    """
    if supports_flash_attn(q.device, q.dtype, q.shape[-1]):
        return _flash_attn(q, k, v, causal, scale)
    return _torch(q, k, v, causal, scale)


def supports_flash_attn(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Return whether flash-attn is installed and takes queries of this device, type and head dim.

    It is left alone on cards on which another kernel is known to be faster.
    """
    return (
        device.type == "cuda"
        and cards.dense_library(device, dim) in (None, cards.FLASH_ATTN)
        and dtype in (torch.float16, torch.bfloat16)
        and dim <= _MAX_DIM
        and torch.cuda.get_device_capability(device) >= _AMPERE
        and _flash_attn_func() is not None
    )


def has_fast_kernel(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Return whether `flash` has a kernel for this type and dim that is made for the device, and not a general one.

    Where a card was measured: whether one of a library was the fastest.
    """
    if supports_flash_attn(device, dtype, dim):
        return True
    if device.type == "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return False
    named = cards.dense_library(device, dim)
    return named == cards.FLASH or (named != cards.OWN and _cudnn_works(device, dtype, dim))


def compute_family(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Return the `kernel_family` of a device, with the library that `flash` calls for this type and dim.

    That is `-flash-attn`, `-cudnn` or `-flash` (`cuda-9.0-cudnn`): their results on one device differ in their last
    bits. A device and type for which there is one kernel get none.
    """
    family = kernel_family(device)
    if supports_flash_attn(device, dtype, dim):
        return f"{family}-{cards.FLASH_ATTN}"
    if device.type == "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return family
    return f"{family}-{_torch_library(device, dtype, dim)}"


@functools.cache
def _flash_attn_func() -> Callable[..., Any] | None:
    """Return `flash_attn.flash_attn_func`; None where it cannot be imported."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"):
            _log.warning("flash-attn is installed but cannot be imported (%s); PyTorch's kernels are used", error)
        return None
    function: Callable[..., Any] = flash_attn_func
    return function


def _flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call flash-attn: `[1, T, H, D]` and `[1, n, K, D]` -> `[1, T, H, D]` and log-sum-exp `[1, H, T]` in float32."""
    function = _flash_attn_func()
    assert function is not None
    keys, values = (side.transpose(0, 1)[None] for side in (k, v))  # views
    out, lse, _ = function(q[None], keys, values, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out[0], lse[0].transpose(0, 1)


def _torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call PyTorch's kernel. Few rows are folded, so that all query heads of a KV head pass over K and V together."""
    rows, heads, dim = q.shape
    assert not causal or rows == k.shape[1]
    kv_heads = k.shape[0]
    group = heads // kv_heads
    has_groups = q.device.type == "cpu" or q.dtype != torch.float32  # else keys are repeated for every query head
    if (causal and rows > 1) or (rows * group > _FOLDED_ROWS and has_groups):
        out, lse = _operator(q.transpose(0, 1)[None], k[None], v[None], causal and rows > 1, scale)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    folded = q.view(rows, kv_heads, group, dim).permute(1, 0, 2, 3).reshape(1, kv_heads, rows * group, dim)
    out, lse = _operator(folded, k[None], v[None], False, scale)
    out = out[0].view(kv_heads, rows, group, dim).permute(1, 0, 2, 3).reshape(rows, heads, dim)
    return out, lse[0].view(kv_heads, rows, group).permute(1, 0, 2).reshape(rows, heads)


def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call one operator on `[1, heads, rows, D]`; returns output of this shape and log-sum-exp `[1, heads, rows]`."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if q.dtype == torch.float32:  # flash kernels on CUDA take 16-bit types only
        group = q.shape[1] // k.shape[1]
        if group > 1:  # this operator wants equal head counts
            k, v = (side.repeat_interleave(group, dim=1) for side in (k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
    elif _torch_library(q.device, q.dtype, q.shape[3]) == cards.CUDNN:
        out, lse = _cudnn(q, k, v, causal, scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def _torch_library(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Return which of PyTorch's two kernels for 16-bit types is called: `cards.CUDNN` or `cards.FLASH`."""
    is_other = cards.dense_library(device, dim) == cards.FLASH
    return cards.FLASH if is_other or not _cudnn_works(device, dtype, dim) else cards.CUDNN


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.view(q.shape[:3])  # it has `[1, heads, rows, 1]`


@functools.cache
def _cudnn_works(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Return whether cuDNN computes a small case with two query heads a KV head, output and log-sum-exp, as expected.

    Versions and GPUs differ in what they take. That of traced steps (`meta`) takes it.
    """
    if device.type == "meta":
        return True
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 64, dim, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    try:
        out, lse = _cudnn(q, k, v, True, dim**-0.5)
    except RuntimeError as error:
        _log.info("cuDNN's attention is not used on %s: %s", device, str(error).splitlines()[0])
        return False
    wide, values = (side.float().repeat_interleave(2, dim=1) for side in (k, v))
    hidden = torch.ones(64, 64, dtype=torch.bool, device=device).triu(1)
    logits = (q.float() @ wide.transpose(2, 3) * dim**-0.5).masked_fill(hidden, -torch.inf)
    return torch.allclose(out.float(), logits.softmax(-1) @ values, atol=2e-2, rtol=2e-2) and torch.allclose(
        lse, logits.logsumexp(-1), atol=1e-2, rtol=1e-2
    )
