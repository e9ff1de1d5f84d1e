"""Attention of a decode step over a layer's whole cache: the one entrance, and the torch path behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixkvq.kernels.packed import packed_attention
from mixkvq.kernels.partial import Partial, causal, dense_attention, merge, sink_rows
from mixkvq.quant.rotation import rotate
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store.layout import PageLayout
from mixkvq.store.shape import OVERHANG
from mixkvq.store.tensors import CacheTensors
from mixkvq.store.view import DenseTokens, PackedPages

#: New tokens that one decode step can have.
MAX_STEP = OVERHANG


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: CacheTensors,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    append: bool = False,
    statistics: QueryStatistics | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Softmax attention of new tokens over all stored tokens of their sequences, and over themselves, causally.

    Args:
        query: ``[B, Hq, L, D]`` after RoPE, not scaled; L is 1 to 8.
        keys, values: ``[B, Hkv, L, D]``, the new tokens.
        cache: everything stored before them.
        scaling: factor of the logits.
        softcap, sinks: see :func:`mixkvq.kernels.reference.attention`.
        append: also write the new tokens into the dense slots, of which there are ``sinks + R + L`` then. Lengths stay.
        statistics: of the B sequences, which are brought up to date with the queries.
        kernel: "auto" is the fastest on the query's device; "torch" runs anywhere, and may wait for the device.

    Returns:
        ``[B, Hq, L, D]`` in the queries' type.
    """
    if query.shape[2] > MAX_STEP:
        raise ValueError(f"A decode step has 1 to {MAX_STEP} new tokens; {query.shape[2]} were given.")
    needed, slots = cache.sinks + cache.layout.tokens + query.shape[2], cache.dense_keys.shape[2]
    if append and slots < needed:
        raise ValueError(f"To append {query.shape[2]} tokens the cache needs {needed} dense slots, it has {slots}.")
    if kernel == "auto":
        kernel = fastest_kernel(query, cache)
    elif kernel in KERNELS:
        _check_kernel(kernel, query, cache)
    else:
        raise ValueError(f"There is no kernel '{kernel}'. Known: auto, {', '.join(KERNELS)}.")
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    return KERNELS[kernel](query, keys, values, cache, append=append, statistics=statistics, **options)


def fastest_kernel(query: Tensor, cache: CacheTensors) -> str:
    """The one of :data:`KERNELS` that "auto" stands for."""
    if not has_kernels(query.device):
        return "torch"
    kernel = kernel_of_format(cache.layout, query.dtype)
    return "triton" if kernel == "cuda" and _unsupported(query, cache) else kernel


def kernel_of_format(layout: PageLayout, dtype: torch.dtype) -> str:
    """The one of :data:`KERNELS` that a GPU takes for pages of a format and queries of a type, if it has them all."""
    if unserved(layout):
        return "torch"
    from mixkvq.kernels.cuda.decode import unsupported_format

    return "triton" if unsupported_format(layout, dtype) else "cuda"


def unserved(layout: PageLayout) -> str | None:
    """Why no kernel of a GPU reads or writes pages of a format, which is then left to torch operations, or None."""
    reasons = (
        (layout.key_axis == "token", "its keys have scales per token (key_axis='token')"),
        (layout.key_levels is not None, "its keys have levels that are not uniform (key_levels)"),
        (layout.value_levels is not None, "its values have levels that are not uniform (value_levels)"),
        (layout.outliers > 0, "it keeps outliers apart (outliers)"),
        (layout.key_rope is not None, "its keys are quantized before RoPE (key_rope='before')"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _check_kernel(kernel: str, query: Tensor, cache: CacheTensors) -> None:
    reason = unserved(cache.layout) if kernel != "torch" else None
    if kernel == "cuda":
        reason = reason or _unsupported(query, cache)
    if reason:
        raise ValueError(f"The kernel '{kernel}' cannot serve this step: {reason}. 'auto' takes one that can.")


def _unsupported(query: Tensor, cache: CacheTensors) -> str | None:
    from mixkvq.kernels.cuda.decode import unsupported

    return unsupported(query, cache)


def _by_cuda(query: Tensor, keys: Tensor, values: Tensor, cache: CacheTensors, **options: Any) -> Tensor:
    from mixkvq.kernels.cuda.decode import decode_attention as run

    return run(query, keys, values, cache, **options)


def _by_triton(query: Tensor, keys: Tensor, values: Tensor, cache: CacheTensors, **options: Any) -> Tensor:
    from mixkvq.kernels.triton.decode import decode_attention as run

    return run(query, keys, values, cache, **options)


def _by_torch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: CacheTensors,
    *,
    append: bool,
    statistics: QueryStatistics | None,
    **options: Any,
) -> Tensor:
    pages, dense = PackedPages.of_cache(cache), DenseTokens.of_cache(cache)
    output = torch_attention(query, keys, values, pages, dense, None, rotated=cache.rotated, **options)
    if append:
        _append(keys, values, cache)
    if statistics is not None:
        statistics.update(query)
        statistics.sample(query, cache.lengths)
    return output


#: What can stand behind :func:`decode_attention`.
KERNELS: dict[str, Callable[..., Tensor]] = {"cuda": _by_cuda, "triton": _by_triton, "torch": _by_torch}


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of :mod:`mixkvq.kernels.triton` are to be used for tensors on this device."""
    if device.type != "cuda":
        return False
    from mixkvq.kernels import triton

    return triton.available(device)


def torch_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: PackedPages | None,
    dense: DenseTokens,
    visible: Tensor | None,
    *,
    rotated: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`decode_attention` in torch operations, for any number of new tokens.

    Args:
        pages, dense: the stored tokens, all of them visible to every new one.
        visible: bool ``[B or 1, L, L]``, which new token sees which; None is causal.
        rotated: whether values were rotated before they were packed.
    """
    batch, heads, length, _ = query.shape
    kv_heads = keys.shape[1]
    rows = (query.float() * scaling).unflatten(1, (kv_heads, heads // kv_heads))
    parts = []
    if pages is not None:
        part = packed_attention(rows.flatten(2, 3), pages, softcap)
        parts.append(Partial(rotate(part.output), part.lse) if rotated else part)
    parts.append(_attend_dense(rows, keys, values, dense, visible, softcap))
    output = merge(parts, sink_rows(sinks, kv_heads, length))
    return output.view(batch, heads, length, -1).to(query.dtype)


def _attend_dense(
    query: Tensor, keys: Tensor, values: Tensor, dense: DenseTokens, visible: Tensor | None, softcap: float | None
) -> Partial:
    """Attention over sinks, residual and the new tokens, for ``query [B, Hkv, n, L, D]``."""
    length = keys.shape[2]
    all_keys = torch.cat([dense.keys, keys.to(dense.keys.dtype)], 2)
    all_values = torch.cat([dense.values, values.to(dense.values.dtype)], 2)
    if length == 1 and dense.mask is None:
        return dense_attention(query, all_keys, all_values, None, softcap)
    device = keys.device
    if visible is None:
        visible = causal(length, length, device)[None]
    past = torch.ones(1, dense.keys.shape[2], dtype=torch.bool, device=device)
    if dense.mask is not None:
        past = dense.mask
    batch = max(past.shape[0], visible.shape[0])
    past = past[:, None, :].expand(batch, length, -1)
    seen = torch.cat([past, visible.expand(batch, -1, -1)], 2)[:, None, None]
    return dense_attention(query, all_keys, all_values, seen, softcap)


def _append(keys: Tensor, values: Tensor, cache: CacheTensors) -> None:
    """Write new tokens behind the filled dense slots."""
    _, filled = cache.places()
    slots = filled[:, None] + torch.arange(keys.shape[2], device=keys.device)
    rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
    cache.dense_keys[rows, :, slots] = keys.transpose(1, 2).to(cache.dense_keys.dtype)
    cache.dense_values[rows, :, slots] = values.transpose(1, 2).to(cache.dense_values.dtype)
