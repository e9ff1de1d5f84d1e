"""Quantized blocks become bytes: every field of their pages and chunks, written to records that somebody chose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixkvq.quant.affine import storable
from mixkvq.quant.block import DENSE_BITS, QuantizedKeys, QuantizedValues
from mixkvq.quant.outliers import Outliers
from mixkvq.quant.planes import pack, plane_widths, split_planes
from mixkvq.store.layout import PageLayout


def chunk_counts(layout: PageLayout, bits: int, widths: Tensor) -> Tensor:
    """Chunks that each of N pages needs for one promoted width: ``[N]`` int64, from ``widths [N, Hkv, D]``."""
    lanes = layout.lanes(bits)
    return ((widths == bits).sum((1, 2)) + lanes - 1) // lanes


def write_blocks(
    layout: PageLayout,
    pages: Tensor,
    chunks: dict[int, Tensor],
    keys: QuantizedKeys,
    values: QuantizedValues,
    numbers: Tensor,
    run_starts: dict[int, Tensor],
) -> None:
    """Pack N quantized blocks. May wait for the device.

    Args:
        pages: ``[P, layout.page.nbytes]`` uint8, the records of which ``numbers [N]`` are written.
        chunks: by promoted width, ``[C, layout.chunks[bits].nbytes]`` uint8.
        run_starts: by promoted width, ``[N]``: the first record of each block's run of chunks.
    """
    at = numbers.long()
    fields = layout.page.views(pages)
    for name, data in _page_fields(layout, keys, values):
        fields[name][at] = data.to(fields[name].dtype)
    for bits, data in chunks.items():
        counts = chunk_counts(layout, bits, keys.bits)
        first_lane = pad((keys.bits == bits).sum(2).cumsum(1), (1, 0))
        fields[f"run_{bits}"][at] = torch.stack([run_starts[bits].long(), counts], 1).to(torch.int32)
        fields[f"first_lane_{bits}"][at] = first_lane.to(torch.int16)
        _write_lanes(layout, bits, data, keys, first_lane[:, -1], counts, run_starts[bits].long())


def _page_fields(layout: PageLayout, keys: QuantizedKeys, values: QuantizedValues) -> Iterator[tuple[str, Tensor]]:
    if layout.key_bits == DENSE_BITS:
        yield "keys", keys.dense
    else:
        extra = torch.where(keys.bits == DENSE_BITS, 0, keys.bits - layout.key_bits)
        for i, plane in enumerate(split_planes(keys.codes >> extra[:, :, None], layout.key_bits)):
            yield f"key_plane_{i}", pack(plane, plane_widths(layout.key_bits)[i], dim=-2)
        if layout.key_axis == "token":
            yield "key_scale", keys.scale.transpose(2, 3)
            yield "key_zero", keys.zero.transpose(2, 3)
        else:
            yield "key_scale", storable(keys.scale * 2.0 ** extra[:, :, None], layout.param_dtype)
            yield "key_zero", keys.zero
    yield from _outlier_fields("key", keys.outliers)
    yield from _outlier_fields("value", values.outliers)
    if layout.value_bits == DENSE_BITS:
        yield "values", values.dense
    else:
        for i, plane in enumerate(split_planes(values.codes.transpose(2, 3), layout.value_bits)):
            yield f"value_plane_{i}", pack(plane, plane_widths(layout.value_bits)[i], dim=-1)
        yield "value_scale", values.scale.transpose(2, 3)
        if not layout.value_symmetric:
            yield "value_zero", values.zero.transpose(2, 3)


def _outlier_fields(kind: str, outliers: Outliers | None) -> Iterator[tuple[str, Tensor]]:
    if outliers is not None:
        yield f"{kind}_outlier", outliers.values
        yield f"{kind}_place", outliers.at


def _write_lanes(
    layout: PageLayout, bits: int, data: Tensor, keys: QuantizedKeys, channels: Tensor, counts: Tensor, starts: Tensor
) -> None:
    """Put the channels of one promoted tier into chunks, lane after lane, head after head.

    Args:
        channels, counts, starts: ``[N]``: each block's promoted channels, chunks, and first chunk.
    """
    total, width, device = int(counts.sum()), layout.lanes(bits), data.device
    if not total:
        return
    chunks_before = counts.cumsum(0) - counts
    block, head, channel = (keys.bits == bits).nonzero(as_tuple=True)
    channels_before = channels.cumsum(0) - channels
    lane = torch.arange(len(block), device=device) - channels_before[block] + chunks_before[block] * width
    source = keys.dense if bits == DENSE_BITS else keys.codes & ((1 << layout.extra_bits(bits)) - 1)
    lanes = source.new_zeros(total * width, layout.tokens)
    lanes[lane] = source[block, head, :, channel]
    tokens_by_lane = lanes.unflatten(0, (total, width)).transpose(1, 2)  # [chunks, R, lanes]
    numbers = torch.zeros(total * width, dtype=torch.long, device=device)
    numbers[lane] = channel

    owner = torch.repeat_interleave(counts, output_size=total)
    records = torch.arange(total, device=device) - chunks_before[owner] + starts[owner]
    fields = layout.chunks[bits].views(data)
    fields["channel"][records] = numbers.view(total, width).to(fields["channel"].dtype)
    if bits == DENSE_BITS:
        fields["keys"][records] = tokens_by_lane.to(fields["keys"].dtype)
        return
    extra = layout.extra_bits(bits)
    for i, plane in enumerate(split_planes(tokens_by_lane, extra)):
        fields[f"plane_{i}"][records] = pack(plane, plane_widths(extra)[i], dim=-2)
