"""Pages whose codes are halved where they lie, in the format of half as many bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixkvq.quant.narrow import narrow_codes, narrow_scale
from mixkvq.quant.planes import join_planes, pack, plane_widths, split_planes, unpack
from mixkvq.store.layout import PageLayout

#: Pages that are rewritten at once, to bound memory.
PAGES_AT_ONCE = 64


def narrow_pages(old: PageLayout, new: PageLayout, pages: Tensor) -> Tensor:
    """Pages of codes of ``2b`` bits as pages of ``b`` bits.

    Args:
        old, new: formats without promoted channels, alike but for ``key_bits`` and ``value_bits``, each half as wide.
        pages: ``[P, old.page.nbytes]`` uint8.

    Returns:
        ``[P, new.page.nbytes]`` uint8.
    """
    narrow = torch.empty(len(pages), new.page.nbytes, dtype=torch.uint8, device=pages.device)
    for start in range(0, len(pages), PAGES_AT_ONCE):
        part = slice(start, start + PAGES_AT_ONCE)
        fields = new.page.views(narrow[part])
        for name, data in _fields(old, old.page.views(pages[part])):
            fields[name].copy_(data)
    return narrow


def _fields(old: PageLayout, fields: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for part, bits, tokens in (("key", old.key_bits, -2), ("value", old.value_bits, -1)):
        planes = [
            unpack(fields[f"{part}_plane_{i}"].contiguous(), width, tokens)
            for i, width in enumerate(plane_widths(bits))
        ]
        codes = narrow_codes(join_planes(planes, bits), bits)
        half = bits // 2
        for i, plane in enumerate(split_planes(codes, half)):
            yield f"{part}_plane_{i}", pack(plane, plane_widths(half)[i], tokens)
        yield f"{part}_scale", narrow_scale(fields[f"{part}_scale"], bits, old.param_dtype)
        if f"{part}_zero" in fields:
            yield f"{part}_zero", fields[f"{part}_zero"]
