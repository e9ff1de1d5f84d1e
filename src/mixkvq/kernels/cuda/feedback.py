"""Launches ``feedback.cu``: the fast way to :func:`mixkvq.kernels.feedback.move_keys`."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from mixkvq.kernels.cuda.module import NO_BINDINGS, LaunchableKernel, address, has_bindings, load_kernel, refusal
from mixkvq.quant.affine import CLIP_FACTORS, CLIPPED_LEVELS, GAINS
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.feedback import feedback_parts
from mixkvq.store.layout import PageLayout

THREADS = 256
#: What the kernel is written for: a warp holds a channel of so many tokens.
TOKENS = 128
#: Blocks for every row of samples from which on their products are summed once, before the kernel.
SHARED_BLOCKS = 4


class Arguments(ctypes.Structure):
    """``struct Arguments`` of ``feedback.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "rows", "starts", "active", "bits", "samples", "covariance")),
        ("key_strides", ctypes.c_longlong * 3),
        ("sample_strides", ctypes.c_longlong * 3),
        ("sample_count", ctypes.c_int),
        ("damping", ctypes.c_float),
        ("factors", ctypes.c_float * 4),
        ("gains", ctypes.c_float * 2),
    ]


def unsupported(keys: Tensor, samples: Tensor, layout: PageLayout) -> str | None:
    """Why the kernel cannot move such keys, or None if it can."""
    if not has_bindings():
        return NO_BINDINGS
    parts = feedback_parts(layout.key_dim)
    checks = (
        (layout.tokens != TOKENS, f"pages of {layout.tokens} tokens"),
        (layout.key_group not in (32, 64, 128), f"key groups of {layout.key_group} tokens"),
        (layout.key_dim % (16 * parts) != 0, f"head dimension {layout.key_dim}"),
        (layout.param_dtype != torch.float16, f"scales in {layout.param_dtype}"),
        (keys.dtype not in (torch.bfloat16, torch.float16), f"keys in {keys.dtype}"),
        (samples.dtype != keys.dtype, f"keys in {keys.dtype} and samples in {samples.dtype}"),
        (keys.stride(-1) != 1 or samples.stride(-1) != 1, "strided channels"),
    )
    if reason := next((reason for fails, reason in checks if fails), None):
        return reason
    return refusal(keys.device, shared_bytes(layout.key_dim // parts))


def shared_bytes(channels: int) -> int:
    """``sizeof(Memory)`` of ``feedback.cu``."""
    return 4 * (channels * channels + 2 * TOKENS) + 2 * channels * (TOKENS + 4) + 2 * channels


def move_keys(
    keys: Tensor,
    rows: Tensor,
    starts: Tensor,
    active: Tensor,
    bits: Tensor,
    samples: Tensor,
    layout: PageLayout,
    *,
    damping: float,
    key_clip: bool,
    key_unbiased: bool,
) -> None:
    """See :func:`mixkvq.kernels.feedback.move_keys`; for what :func:`unsupported` lets pass."""
    if not len(rows):
        return
    macros = kernel_macros(layout, keys.dtype, clip=key_clip, unbiased=key_unbiased)
    kernel: LaunchableKernel = load_kernel("feedback.cu", "move_keys", macros, keys.device.index or 0)
    covariance = None
    if len(rows) >= SHARED_BLOCKS * len(samples):
        flat = samples.float()
        covariance = flat.transpose(2, 3) @ flat
    arguments = Arguments(
        *(address(x) for x in (keys, rows, starts, active, bits, samples, covariance)),
        keys.stride()[:3],
        samples.stride()[:3],
        samples.shape[2],
        damping,
        CLIP_FACTORS[1:],
        GAINS,
    )
    with torch.cuda.device_of(keys):
        kernel.launch((len(rows) * layout.kv_heads, feedback_parts(layout.key_dim), 1), THREADS, arguments)


@lru_cache(maxsize=64)
def kernel_macros(layout: PageLayout, dtype: torch.dtype, *, clip: bool, unbiased: bool) -> tuple[tuple[str, int], ...]:
    """The kernel's constants."""
    macros = {
        "KV_HEADS": layout.kv_heads,
        "HEAD_DIM": layout.key_dim,
        "PARTS": feedback_parts(layout.key_dim),
        "KEY_BITS": layout.key_bits,
        "KEY_GROUP": layout.key_group,
        "TOKENS": TOKENS,
        "CLIP": clip,
        "UNBIASED": unbiased,
        "CLIPPED_LEVELS": CLIPPED_LEVELS,
        "DENSE_BITS": DENSE_BITS,
        "BFLOAT16": dtype == torch.bfloat16,
    }
    return tuple((name, int(value)) for name, value in macros.items())
