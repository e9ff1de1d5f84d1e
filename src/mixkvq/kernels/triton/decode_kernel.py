"""The kernel of :mod:`mixkvq.kernels.triton.decode`: which program does what."""

# Triton's `and` evaluates both sides.
# ruff: noqa: SIM102
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.codes import rounded
from mixkvq.kernels.triton.dense import append_tokens, attend_dense
from mixkvq.kernels.triton.merge import is_last, joined, leave, merged, normalized, rotated_back
from mixkvq.kernels.triton.pages import attend_pages
from mixkvq.kernels.triton.softmax import logit_factor
from mixkvq.kernels.triton.statistics import KEPT_SAMPLES, add_magnitudes, keep_samples


# The stride follows the length of the context: nothing is to be compiled again when that grows.
@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    query,
    new_keys,
    new_values,
    output,
    pages,
    chunks,
    table,
    lengths,
    dense_keys,
    dense_values,
    sink_logits,
    states,
    sums,
    tickets,
    statistics_total,
    statistics_count,
    statistics_samples,
    scaling,
    cap,
    query_strides,
    new_key_strides,
    new_value_strides,
    dense_key_strides,
    dense_value_strides,
    table_stride,
    length,
    group,
    row_tiles,
    team,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROTATED: tl.constexpr,
    APPEND: tl.constexpr,
):
    """Grid ``(1 + splits, KV heads * row_tiles, B)``; tensors as in ``decode_attention``, strides of B, heads, tokens.

    Args:
        chunks: tuple, by tier.
        states, sums: scratch, see :mod:`mixkvq.kernels.triton.merge`: a place for every program.
        tickets: counters, 0 before and after: for every sequence and (head, row tile) its own, and its teams'.
        cap: of the logits, with SOFTCAP.
        group: query heads of a KV head.
        team: splits that are merged first among themselves.
        F: the page format, :class:`~mixkvq.kernels.triton.read_format.ReadFormat`.
        ROWS, *_CHANNELS: rows of a tile, and channels of keys, values and value groups, padded.
        ROTATED: size of the Hadamard blocks of stored values, 1 without rotation.
    """
    split, splits = tl.program_id(0), tl.num_programs(0) - 1
    kv_heads = tl.num_programs(1) // row_tiles
    head, row_tile = tl.program_id(1) // row_tiles, tl.program_id(1) % row_tiles
    sequence = tl.program_id(2).to(tl.int64)
    task = sequence * tl.num_programs(1) + tl.program_id(1)
    teams = tl.cdiv(splits, team)
    places, tickets = task * (1 + splits), tickets + task * (1 + teams)

    row = row_tile * ROWS + tl.arange(0, ROWS)
    valid_rows = row < group * length
    query_head, token = head * group + row // length, row % length
    query += sequence * query_strides[0]
    query_rows = query + query_head * query_strides[1] + token * query_strides[2]
    channel = tl.arange(0, KEY_CHANNELS)[:, None]
    q = tl.load(query_rows[None, :] + channel, mask=(channel < F.key_dim) & valid_rows[None, :], other=0)
    factor = logit_factor(scaling, cap, SOFTCAP)

    stored = tl.load(lengths + sequence)
    not_sinks = tl.maximum(stored - SINK_TOKENS, 0)
    blocks = not_sinks // F.tokens
    share = tl.maximum(tl.cdiv(blocks, tl.maximum(splits, 1)), 1)
    used = tl.cdiv(blocks, share)
    ready = split >= 0

    if split == 0:
        filled = tl.minimum(stored, SINK_TOKENS) + not_sinks % F.tokens
        k = new_keys + sequence * new_key_strides[0] + head * new_key_strides[1]
        v = new_values + sequence * new_value_strides[0] + head * new_value_strides[1]
        slots_k = dense_keys + sequence * dense_key_strides[0] + head * dense_key_strides[1]
        slots_v = dense_values + sequence * dense_value_strides[0] + head * dense_value_strides[1]
        top, mass, total = attend_dense(
            q,
            token,
            slots_k,
            slots_v,
            dense_key_strides[2],
            dense_value_strides[2],
            k,
            v,
            new_key_strides[2],
            new_value_strides[2],
            filled,
            length,
            factor,
            cap,
            SOFTCAP,
            F,
            VALUE_CHANNELS,
        )
        leave(states, sums, places, top, mass, (total,), valid_rows, F.value_dim, F.value_dim)
        if APPEND and row_tile == 0:
            slots_k += filled * dense_key_strides[2]
            slots_v += filled * dense_value_strides[2]
            append_tokens(slots_k, dense_key_strides[2], k, new_key_strides[2], length, F.key_dim, KEY_CHANNELS)
            append_tokens(slots_v, dense_value_strides[2], v, new_value_strides[2], length, F.value_dim, VALUE_CHANNELS)
        if statistics_total is not None and row_tile == 0:
            magnitudes = statistics_total + (sequence * kv_heads + head) * F.key_dim
            heads = query + head * group * query_strides[1]
            add_magnitudes(
                magnitudes, heads, query_strides[1], query_strides[2], group, length, F.key_dim, KEY_CHANNELS
            )
            if head == 0:
                counted = tl.load(statistics_count + sequence)
                tl.store(statistics_count + sequence, counted + group * length)
            if statistics_samples is not None:
                ring = statistics_samples + (sequence * kv_heads + head) * KEPT_SAMPLES * F.key_dim
                keep_samples(
                    ring, heads, query_strides[1], query_strides[2], stored, group, length, F.key_dim, KEY_CHANNELS
                )
    else:
        first = (split - 1) * share
        last = tl.minimum(first + share, blocks)
        if first < last:
            DTYPE: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.bfloat16
            top, mass, parts = attend_pages(
                q,
                query_rows,
                valid_rows,
                pages,
                chunks,
                table + sequence * table_stride,
                first,
                last,
                head,
                factor,
                cap,
                SOFTCAP,
                F,
                GROUP_CHANNELS,
                DTYPE,
            )
            leave(states, sums, places + split, top, mass, parts, valid_rows, F.value_dim, F.value_group_dim)
        if team > 1:
            # Two rounds of merging, of which the first runs in parallel, are shorter than one where splits are many.
            number = (split - 1) // team
            start = number * team
            ready = is_last(tickets + 1 + number, tl.minimum(team, splits - start))
            if ready and start < used:
                place, count = places + 1 + start, tl.minimum(team, used - start)
                top, mass, total = merged(states, sums, place, count, 1, valid_rows, F.value_dim, VALUE_CHANNELS)
                tl.debug_barrier()
                leave(states, sums, place, top, mass, (total,), valid_rows, F.value_dim, F.value_dim)

    if ready:
        if is_last(tickets, teams + 1):
            count = tl.cdiv(used, team)
            top, mass, total = merged(states, sums, places + 1, count, team, valid_rows, F.value_dim, VALUE_CHANNELS)
            if ROTATED > 1:
                total = rotated_back(total, ROTATED)
            dense = merged(states, sums, places, 1, 1, valid_rows, F.value_dim, VALUE_CHANNELS)
            top, mass, total = joined(top, mass, total, dense[0], dense[1], dense[2])
            sink_row = None
            if sink_logits is not None:
                sink_row = tl.load(sink_logits + query_head, mask=valid_rows, other=0).to(tl.float32)
            total = normalized(top, mass, total, sink_row)
            value_channel = tl.arange(0, VALUE_CHANNELS)[:, None]
            target = output + ((sequence * kv_heads * group + query_head) * length + token) * F.value_dim
            inside = (value_channel < F.value_dim) & valid_rows[None, :]
            result = rounded(total, output.dtype.element_ty).to(output.dtype.element_ty)
            tl.store(target[None, :] + value_channel, result, mask=inside)
