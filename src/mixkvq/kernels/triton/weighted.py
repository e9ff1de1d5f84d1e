"""Device functions for the softmax-weighted sum of the packed values of a page.

Sums are kept apart by value group: ``sums`` is a tuple of ``[channels of a group, rows]``, and ``offsets`` a tuple of
``[16, rows]`` whose sum over the first dimension belongs to every channel of the group: it collects the zeros, and
takes away the bias of the codes (:mod:`mixkvq.kernels.triton.codes`).
"""

# Triton compiles what follows a return, and knows no starred tuples.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.codes import code_bias, operand, product, rounded, value_codes


@triton.jit
def no_sums(F: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Zero ``sums`` and ``offsets``."""
    GROUPS: tl.constexpr = F.value_groups
    sums, offsets = (), ()
    for _ in tl.static_range(GROUPS):
        sums = sums + (tl.zeros((CHANNELS, ROWS), tl.float32),)
        offsets = offsets + (tl.zeros((16, ROWS), tl.float32),)
    return sums, offsets


@triton.jit
def add_values(
    sums,
    offsets,
    weights,
    decay,
    page,
    head,
    STEP: tl.constexpr,
    F: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """``sums`` and ``offsets`` times ``decay [rows]``, with the values of a step's tokens added.

    Args:
        weights: tuple of ``[16 tokens, rows]`` float32, one for every tile of the step.
        page: pointer to the page's bytes.
        CHANNELS: those of a value group, padded.
        DTYPE, NATIVE: type of products with codes, and with values that are not quantized.
    """
    GROUPS: tl.constexpr = F.value_groups
    TILES: tl.constexpr = len(F.tile_starts[STEP])
    BIAS: tl.constexpr = code_bias(F.value_planes, DTYPE)
    new_sums, new_offsets = (), ()
    for g in tl.static_range(GROUPS):
        total, offset = sums[g] * decay[None, :], offsets[g] * decay[None, :]
        for i in tl.static_range(TILES):
            if F.dense_values:
                values = stored_values(page, head, g, F.tile_starts[STEP][i], F, CHANNELS)
                total = product(rounded(values, NATIVE), rounded(weights[i], NATIVE), total)
            else:
                token = F.tile_starts[STEP][i] + tl.arange(0, 16) + (head * F.value_groups + g) * F.tokens
                scale = tl.load((page + F.value_scale).to(tl.pointer_type(F.param)) + token).to(tl.float32)
                if F.value_symmetric:
                    zero = -0.5 * F.value_levels * scale
                else:
                    zero = tl.load((page + F.value_zero).to(tl.pointer_type(F.param)) + token).to(tl.float32)
                scaled = rounded(weights[i] * scale[:, None], DTYPE)
                codes = value_codes(page, head, g * F.value_group_dim, F.tile_starts[STEP][i], F, CHANNELS, BIAS)
                total = product(operand(codes, BIAS, DTYPE), scaled, total)
                offset += weights[i] * zero[:, None] - BIAS * scaled.to(tl.float32)
        new_sums = new_sums + (total,)
        new_offsets = new_offsets + (offset,)
    return new_sums, new_offsets


@triton.jit
def stored_values(page, head, g, START: tl.constexpr, F: tl.constexpr, CHANNELS: tl.constexpr):
    """Values of 16 tokens that are not quantized: ``[CHANNELS, 16]`` of value group ``g``."""
    channel = tl.arange(0, CHANNELS)[:, None]
    token = START + tl.arange(0, 16)[None, :]
    column = (page + F.values).to(tl.pointer_type(F.stored)) + head * (F.tokens * F.value_dim) + g * F.value_group_dim
    return tl.load(column + token * F.value_dim + channel, mask=channel < F.value_group_dim, other=0)
