"""What number a stored bit pattern stands for: pages back to float32, a slice at a time."""

from __future__ import annotations

from torch import Tensor

from mixkvq.quant.affine import dequantize, symmetric_zero
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.levels import positions
from mixkvq.quant.outliers import Outliers, put_outliers
from mixkvq.quant.planes import join_planes, plane_widths, unpack
from mixkvq.store.view import ChunkSlice, PageSlice


def base_keys(pages: PageSlice) -> Tensor:
    """What the base planes say of the keys, ``[N, Hkv, R, D]``, still rotated if they were; dense channels are 0."""
    layout, fields = pages.layout, pages.fields
    if layout.key_bits == DENSE_BITS:
        return fields["keys"].float()
    codes = positions(_codes(fields, "key_plane", layout.key_bits, dim=-2), layout.key_levels)
    if layout.key_axis == "token":
        scale, zero = (fields[name].transpose(2, 3).unsqueeze(4) for name in ("key_scale", "key_zero"))
        keys = dequantize(codes.unflatten(3, (-1, layout.key_group)), scale, zero).flatten(3)
    else:
        grouped = codes.unflatten(2, (-1, layout.key_group))
        keys = dequantize(grouped, fields["key_scale"].unsqueeze(3), fields["key_zero"].unsqueeze(3)).flatten(2, 3)
    return _with_outliers(keys, fields, "key")


def lane_keys(pages: PageSlice, bits: int) -> Tensor:
    """What the promoted channels of one width add to :func:`base_keys`: ``[N, lanes, R]``; 0 in unowned lanes."""
    layout, chunks = pages.layout, pages.chunks[bits]
    if bits == DENSE_BITS:
        unowned = ~chunks.head.any(2)
        return _by_lane(chunks.fields["keys"]).float().masked_fill(unowned.unsqueeze(2), 0)
    extra = layout.extra_bits(bits)
    codes = _by_lane(_codes(chunks.fields, "plane", extra, dim=-2))
    scale = lane_scale(pages, chunks) * 2.0**-extra
    return (codes.unflatten(2, (scale.shape[2], -1)) * scale.unsqueeze(3)).flatten(2)


def lane_scale(pages: PageSlice, chunks: ChunkSlice) -> Tensor:
    """The base planes' scale of every lane's channel, ``[N, lanes, R / G]``; 0 in unowned lanes."""
    scale = pages.fields["key_scale"].transpose(1, 2).flatten(2)  # [N, R / G, Hkv * D]
    owner = chunks.head.byte().argmax(2)
    column = owner * pages.layout.key_dim + chunks.channel
    gathered = scale.gather(2, column.unsqueeze(1).expand(-1, scale.shape[1], -1)).transpose(1, 2).float()
    return gathered.masked_fill(~chunks.head.any(2, keepdim=True), 0)


def stored_values(pages: PageSlice) -> Tensor:
    """Values as they are stored, still rotated if they were: ``[N, Hkv, R, D]``."""
    layout, fields = pages.layout, pages.fields
    if layout.value_bits == DENSE_BITS:
        return fields["values"].float()
    codes = positions(_codes(fields, "value_plane", layout.value_bits, dim=-1), layout.value_levels)
    grouped = codes.unflatten(2, (layout.value_groups, -1))
    scale = fields["value_scale"]
    zero = symmetric_zero(scale, layout.value_bits) if layout.value_symmetric else fields["value_zero"]
    values = dequantize(grouped, scale.unsqueeze(3), zero.unsqueeze(3))
    return _with_outliers(values.flatten(2, 3).transpose(2, 3), fields, "value")


def _with_outliers(x: Tensor, fields: dict[str, Tensor], kind: str) -> Tensor:
    if f"{kind}_place" not in fields:
        return x
    return put_outliers(x, Outliers(fields[f"{kind}_place"].long(), fields[f"{kind}_outlier"]))


def _codes(fields: dict[str, Tensor], name: str, bits: int, dim: int) -> Tensor:
    planes = [unpack(fields[f"{name}_{i}"], width, dim) for i, width in enumerate(plane_widths(bits))]
    return join_planes(planes, bits)


def _by_lane(chunks: Tensor) -> Tensor:
    """``[N, chunks, R, 16]`` to ``[N, lanes, R]``."""
    return chunks.transpose(2, 3).flatten(1, 2)
