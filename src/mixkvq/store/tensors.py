"""One layer's cache as device kernels read it: tensors only, no books on the host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mixkvq.store.layout import PageLayout


@dataclass(frozen=True)
class CacheTensors:
    """Everything that a kernel needs to find and read a layer's tokens.

    A token's place follows from its number ``i`` in its sequence and from :attr:`lengths` (docs/format.md): sinks are
    dense slots ``0 .. sinks - 1``; of the others, complete blocks of R are pages ``table[b, 0], table[b, 1], ...``, and
    the rest lie in dense slots ``sinks, sinks + 1, ...``.

    Attributes:
        layout: the page format.
        sinks: tokens of each sequence that are never quantized.
        rotated: whether values were rotated before they were stored.
        pages: ``[P, layout.page.nbytes]`` uint8.
        chunks: by promoted width, ``[C, layout.chunks[bits].nbytes]`` uint8; a page's ``run_b`` counts from the first.
        table: ``[B, blocks]`` int32, page numbers; entries past a sequence's complete blocks may be anything.
        lengths: ``[B]`` int32, tokens stored of each sequence.
        dense_keys, dense_values: ``[B, Hkv, slots, D]`` in ``layout.dense_dtype``, at least ``sinks + R`` slots.
    """

    layout: PageLayout
    sinks: int
    rotated: bool
    pages: Tensor
    chunks: dict[int, Tensor]
    table: Tensor
    lengths: Tensor
    dense_keys: Tensor
    dense_values: Tensor

    def places(self) -> tuple[Tensor, Tensor]:
        """Complete blocks and filled dense slots of every sequence, ``[B]`` each."""
        return places(self.lengths, self.sinks, self.layout.tokens)


def places(lengths: Tensor, sinks: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Complete blocks and filled dense slots of sequences with ``lengths [B]`` stored tokens, pages of ``tokens``."""
    after_sinks = (lengths - sinks).clamp(min=0)
    return after_sinks // tokens, lengths.clamp(max=sinks) + after_sinks % tokens
