"""Device functions for the tokens that are not quantized: sinks, residual, and the new ones."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.codes import product, rounded
from mixkvq.kernels.triton.softmax import capped

#: Dense slots that are read at once.
TILE = tl.constexpr(16)
#: The new tokens of a call, at most 8, as one tile.
NEW = tl.constexpr(16)


@triton.jit
def attend_dense(
    query,
    token_of_row,
    keys,
    values,
    key_stride,
    value_stride,
    new_keys,
    new_values,
    new_key_stride,
    new_value_stride,
    filled,
    length,
    factor,
    cap,
    SOFTCAP: tl.constexpr,
    F: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
):
    """Attention over the filled dense slots and, causally, over the new tokens.

    Args:
        query: ``[channels, rows]`` in the queries' type, not scaled, 0 past ``F.key_dim``.
        token_of_row: ``[rows]``, which new token a row is.
        keys, values: pointers to the head's first dense slot; slots are the strides apart.
        new_keys, new_values: the same of the head's first new token.
        filled, length: how many dense slots and new tokens there are.
        factor, cap: see :mod:`mixkvq.kernels.triton.softmax`.

    Returns:
        Maximum ``[rows]``, mass ``[rows]`` and sum ``[VALUE_CHANNELS, rows]``.
    """
    ROWS: tl.constexpr = query.shape[1]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((VALUE_CHANNELS, ROWS), tl.float32)
    token = tl.arange(0, TILE)
    everyone = tl.full((ROWS,), 0, tl.int32) == 0
    for start in range(0, filled, TILE):
        slot = start + token
        visible = (slot < filled)[:, None] & everyone[None, :]
        top, mass, total = attend_tile(
            top,
            mass,
            total,
            query,
            keys + slot * key_stride,
            values + slot * value_stride,
            slot < filled,
            visible,
            factor,
            cap,
            SOFTCAP,
            F,
        )
    token = tl.arange(0, NEW)
    present = token < length
    visible = present[:, None] & (token[:, None] <= token_of_row[None, :])
    return attend_tile(
        top,
        mass,
        total,
        query,
        new_keys + token * new_key_stride,
        new_values + token * new_value_stride,
        present,
        visible,
        factor,
        cap,
        SOFTCAP,
        F,
    )


@triton.jit
def attend_tile(
    top, mass, total, query, keys, values, present, visible, factor, cap, SOFTCAP: tl.constexpr, F: tl.constexpr
):
    """``top``, ``mass`` and ``total`` of :func:`attend_dense` with some tokens more.

    Args:
        keys, values: ``[tokens]`` pointers to the first channel of each.
        present, visible: ``[tokens]``, which may be read; ``[tokens, rows]``, which row sees which. No row may be blind
            as long as ``top`` is infinite.
    """
    KEY_CHANNELS: tl.constexpr = query.shape[0]
    VALUE_CHANNELS: tl.constexpr = total.shape[0]
    channel = tl.arange(0, KEY_CHANNELS)[None, :]
    k = tl.load(keys[:, None] + channel, mask=present[:, None] & (channel < F.key_dim), other=0)
    # New tokens are rounded to the type in which they will be stored.
    logits = product(rounded(rounded(k, F.stored), query.dtype), query) * factor
    logits = tl.where(visible, capped(logits, cap, SOFTCAP), float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 0))
    decay = tl.exp2(top - new_top)
    weights = tl.exp2(logits - new_top[None, :])
    channel = tl.arange(0, VALUE_CHANNELS)[:, None]
    v = tl.load(values[None, :] + channel, mask=present[None, :] & (channel < F.value_dim), other=0)
    added = product(rounded(rounded(v, F.stored), query.dtype), rounded(weights, query.dtype))
    return new_top, mass * decay + tl.sum(weights, 0), total * decay[None, :] + added


@triton.jit
def append_tokens(target, target_stride, source, source_stride, length, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Write new tokens into the dense slots from ``target`` on."""
    token = tl.arange(0, NEW)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (token < length) & (channel < DIM)
    data = tl.load(source + token * source_stride + channel, mask=inside, other=0)
    stored = rounded(data, target.dtype.element_ty).to(target.dtype.element_ty)
    tl.store(target + token * target_stride + channel, stored, mask=inside)
