"""Device functions that merge the partial results of a head's programs, and the output.

A partial result is left in two scratch tensors, at a program's ``place``: ``states [places, 2, rows]`` for maximum (in
units of ``log 2``) and mass, and ``sums [places, rows, value_dim]``, both float32.
"""

# Triton compiles what follows a return, and knows no starred tuples.
# ruff: noqa: RET505
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.softmax import LOG2_E


@triton.jit
def leave(states, sums, place, top, mass, parts, valid_rows, DIM: tl.constexpr, PART_DIM: tl.constexpr):
    """Write a partial result; ``parts`` is a tuple of ``[channels, rows]``, PART_DIM channels of each in turn."""
    CHANNELS: tl.constexpr = parts[0].shape[0]
    ROWS: tl.constexpr = parts[0].shape[1]
    PARTS: tl.constexpr = len(parts)
    row = tl.arange(0, ROWS)
    tl.store(states + 2 * place * ROWS + row, top)
    tl.store(states + (2 * place + 1) * ROWS + row, mass)
    channel = tl.arange(0, CHANNELS)[:, None]
    inside = (channel < PART_DIM) & valid_rows[None, :]
    target = sums + (place * ROWS + row[None, :]) * DIM + channel
    for i in tl.static_range(PARTS):
        tl.store(target + i * PART_DIM, parts[i], mask=inside)


@triton.jit
def is_last(ticket, programs):
    """Whether this is the last of so many programs to come here; what the others wrote before is visible to it then.

    The counter ``ticket`` goes from 0 to 0.
    """
    # An atomic operation is one thread's: barriers tie the other threads' writes and reads to it.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def merged(states, sums, first, count, stride, valid_rows, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Partial results at ``count`` places, ``stride`` apart, as one.

    Returns:
        Maximum ``[rows]``, mass ``[rows]`` and sum ``[CHANNELS, rows]``.
    """
    ROWS: tl.constexpr = valid_rows.shape[0]
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)[:, None]
    inside = (channel < DIM) & valid_rows[None, :]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((CHANNELS, ROWS), tl.float32)
    for i in tl.range(0, count, num_stages=3):
        place = first + i * stride
        # Past the first-level cache, which does not see what other multiprocessors wrote.
        state = states + 2 * place * ROWS + row
        part_top = tl.load(state, cache_modifier=".cg")
        part_mass = tl.load(state + ROWS, cache_modifier=".cg")
        source = sums + (place * ROWS + row[None, :]) * DIM + channel
        part = tl.load(source, mask=inside, other=0, cache_modifier=".cg")
        top, mass, total = joined(top, mass, total, part_top, part_mass, part)
    return top, mass, total


@triton.jit
def joined(top, mass, total, part_top, part_mass, part):
    """Two partial results as one; the second has seen a token."""
    new_top = tl.maximum(top, part_top)
    decay, part_decay = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
    mass = mass * decay + part_mass * part_decay
    return new_top, mass, total * decay[None, :] + part * part_decay[None, :]


@triton.jit
def normalized(top, mass, total, sink_logits):
    """``total / mass``, with a sink logit ``[rows]`` in the denominator if there are any (GPT-OSS)."""
    if sink_logits is None:
        return total / mass[None, :]
    else:
        sink = sink_logits * LOG2_E
        new_top = tl.maximum(top, sink)
        decay = tl.exp2(top - new_top)
        return total * (decay / (mass * decay + tl.exp2(sink - new_top)))[None, :]


@triton.jit
def rotated_back(x, BLOCK: tl.constexpr):
    """``hadamard . x`` for ``x [channels, rows]``, with Hadamard blocks of that size (:mod:`mixkvq.quant.rotation`)."""
    CHANNELS: tl.constexpr = x.shape[0]
    ROWS: tl.constexpr = x.shape[1]
    LEVELS: tl.constexpr = tl.constexpr(BLOCK.bit_length() - 1)
    for level in tl.static_range(LEVELS):
        # Sums and differences of channels that lie 2^level apart.
        pairs = tl.reshape(x, (CHANNELS // (2 << level), 2, 1 << level, ROWS))
        low, high = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 3, 1, 2)), (CHANNELS, ROWS))
    return x * BLOCK**-0.5
