"""Quantize and pack blocks whose widths are decided: what ``PagedStore.write`` does, in one launch."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkvq.kernels.triton.format import TRITON_TYPES, page_format
from mixkvq.kernels.triton.pack_keys import pack_keys
from mixkvq.kernels.triton.pack_values import pack_values
from mixkvq.quant.rotation import hadamard
from mixkvq.store.layout import PageLayout

#: Warps of a program. With the limit on registers, which spills nothing, three programs fit a multiprocessor instead
#: of two; other makers' compilers have no such option.
OPTIONS = {"num_warps": 4, "num_stages": 1, **({"maxnreg": 168} if torch.version.cuda else {})}


def pack_blocks(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    bits: Tensor,
    page_numbers: Tensor,
    run_starts: dict[int, Tensor],
    pages: Tensor,
    chunks: dict[int, Tensor],
    layout: PageLayout,
    *,
    key_clip: bool,
    key_unbiased: bool,
    value_clip: bool,
    value_unbiased: bool,
    rotated: bool,
) -> None:
    """Quantize and pack N blocks of R tokens. The host waits for nothing, so that it can be part of a CUDA graph.

    Args:
        keys, values: ``[X, Hkv, T, D]`` float32, float16 or bfloat16, the last dimension contiguous.
        rows, starts: ``[N]`` int32, each block's row of ``keys`` and its first token.
        bits: ``[N, Hkv, D]`` uint8, the widths of key channels: ``layout.key_bits`` or a promoted one.
        page_numbers: ``[N]`` int32, the record of ``pages`` to write; a block of number -1 is left out.
        run_starts: by promoted width, ``[N]`` int32: the first record of ``chunks[width]`` to write. A block takes
            ``layout.chunks_for(width, promoted)`` records from there.
        pages: ``[P, layout.page.nbytes]`` uint8.
        chunks: by promoted width, ``[C, layout.chunks[width].nbytes]`` uint8.
        key_clip, key_unbiased, value_clip, value_unbiased: as in :class:`~mixkvq.config.MixKVQConfig`.
        rotated: whether values are rotated first.

    Raises:
        ValueError: ``layout.tokens`` is no power of two, or the tensors are not laid out as described.
    """
    form = page_format(
        layout,
        key_clip=key_clip,
        key_unbiased=key_unbiased,
        value_clip=value_clip,
        value_unbiased=value_unbiased,
        rotated=rotated,
    )
    check_sources(keys=keys, values=values)
    starts_of_runs = tuple(run_starts[width] for width in layout.promoted_bits)
    pools = tuple(chunks[width] for width in layout.promoted_bits)
    _check_packed(rows=rows, starts=starts, bits=bits, page_numbers=page_numbers, pages=pages)
    _check_packed(**{f"run_starts_{i}": tensor for i, tensor in enumerate(starts_of_runs)})
    _check_packed(**{f"chunks_{i}": tensor for i, tensor in enumerate(pools)})
    if not len(rows):
        return
    with torch.cuda.device_of(keys):
        _pack[(len(rows) * layout.kv_heads, 2)](
            keys,
            values,
            *keys.stride()[:2],
            keys.stride(3),
            *values.stride()[:2],
            rows,
            starts,
            bits,
            page_numbers,
            starts_of_runs,
            pages,
            pools,
            rotation_signs(layout.value_dim, values.device, values.dtype) if form.rotated else values,
            keys.stride(2),
            values.stride(2),
            form.keys,
            form.values,
            form,
            **OPTIONS,
        )


def check_sources(**sources: Tensor) -> None:
    """Refuse keys and values that the kernels cannot read, with a ``ValueError``."""
    for name, tensor in sources.items():
        readable = tensor.is_floating_point() and tensor.dtype in TRITON_TYPES
        if tensor.ndim != 4 or tensor.stride(3) != 1 or not readable:
            raise ValueError(
                f"{name} {list(tensor.shape)} is {tensor.dtype} with strides {tensor.stride()}; the kernels read "
                "[X, Hkv, T, D] in float32, float16 or bfloat16 with the last dimension contiguous."
            )


def _check_packed(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} {list(tensor.shape)} has strides {tensor.stride()}: make it contiguous.")


@lru_cache(maxsize=32)
def rotation_signs(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rotation ``[D, D]`` without its factor: 1, -1, and 0 outside its blocks, which every type holds exactly."""
    # The interpreter cannot multiply bfloat16.
    return hadamard(dim, device).sign().to(torch.float32 if triton.knobs.runtime.interpret else dtype)


@triton.jit(do_not_specialize=["key_channel"])
def _pack(
    keys,
    values,
    key_row,
    key_head,
    key_channel,
    value_row,
    value_head,
    rows,
    starts,
    bits,
    page_numbers,
    run_starts,
    pages,
    chunks,
    signs,
    key_token: tl.constexpr,
    value_token: tl.constexpr,
    key_side: tl.constexpr,
    value_side: tl.constexpr,
    form: tl.constexpr,
):
    """A program packs the keys or the values of one head of one block.

    Tokens' strides are compiled in: a thread's many loads then have one address and constant offsets.
    """
    block = tl.program_id(0) // form.heads
    head = tl.program_id(0) % form.heads
    number = tl.load(page_numbers + block)
    if number < 0:
        return
    page = pages + number.to(tl.int64) * form.nbytes
    row, start = tl.load(rows + block).to(tl.int64), tl.load(starts + block).to(tl.int64)
    if tl.program_id(1) == 0:
        source = keys + row * key_row + head.to(tl.int64) * key_head + start * key_token
        plan = bits + block * (form.heads * key_side.dim)
        pack_keys(source, key_token, key_channel, plan, head, page, block, run_starts, chunks, key_side, form)
    else:
        source = values + row * value_row + head.to(tl.int64) * value_head + start * value_token
        pack_values(source, value_token, signs, head, page, value_side, form)
