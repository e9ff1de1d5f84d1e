"""Books on a device: lengths and block table, and in a statically shaped cache who gets which page."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixkvq.store.tensors import places


class CacheFullError(RuntimeError):
    """A cache has no room for the tokens that it was given: its shape is fixed, or its budget."""


class Books:
    """Lengths and block table of B sequences that take pages of R tokens from a common stock, on the device.

    All layers of a model share them: page ``n`` of a layer holds the same tokens as page ``n`` of another.

    Attributes:
        lengths: ``[B]`` int32, tokens stored of each sequence.
        table: ``[B, P]`` int32, page numbers.
        next_page: ``[1]`` int32, pages below are taken.
        overflow: ``[1]`` int32, 1 once tokens were dropped because all pages were taken.
        fresh: ``[B]`` int32, the page that the last :meth:`advance` gave each sequence, -1 where it gave none.
    """

    def __init__(self, batch: int, pages: int, sinks: int, tokens: int, device: torch.device) -> None:
        self.sinks, self.tokens, self.pages = sinks, tokens, pages

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.lengths, self.table = zeros(batch), zeros(batch, pages)
        self.next_page, self.overflow, self.fresh = zeros(1), zeros(1), zeros(batch)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [self.lengths, self.table, self.next_page, self.overflow, self.fresh]

    def reset(self) -> None:
        """Forget all sequences, in place."""
        for tensor in self.tensors():
            tensor.zero_()

    def advance(self, count: int) -> None:
        """Take in the ``count`` tokens that every sequence got in a step, without waiting for the device.

        A sequence that completes a block gets a page, in :attr:`fresh`. Where there is none left, its new tokens are
        dropped and :attr:`overflow` is set. :func:`mixkvq.kernels.triton.advance.advance` does the same in one launch.
        """
        before, _ = places(self.lengths, self.sinks, self.tokens)
        after, _ = places(self.lengths + count, self.sinks, self.tokens)
        full = after > before
        page = self.next_page + full.cumsum(0, dtype=torch.int32) - 1
        fits = full & (page < self.pages)
        dropped = full & ~fits
        column = before.clamp(max=self.pages - 1).long()[:, None]
        entry = torch.where(fits[:, None], page[:, None], self.table.gather(1, column))
        self.table.scatter_(1, column, entry)
        self.fresh.copy_(torch.where(fits, page, -1))
        self.lengths += count * ~dropped
        self.next_page += fits.sum(dtype=torch.int32)
        self.overflow.bitwise_or_(dropped.any().int())

    def enter(self, lengths: Sequence[int], rows: Tensor, columns: Tensor, pages: Tensor) -> None:
        """Set all lengths, and table entries ``[rows[i], columns[i]]`` to ``pages[i]``, the next ones that are free."""
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.table[rows, columns] = pages
        self.next_page += len(pages)


class HostBooks:
    """Copies on the device of a growing cache's books, whose home is the host.

    They are made when something other than a step of one token has changed the books, and somebody asks for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._table: Tensor | None = None
        self._lengths: Tensor | None = None

    def table(self, tables: Sequence[Sequence[int]]) -> Tensor:
        """Block tables as ``[B, blocks]`` int32, with zeros behind the shorter ones."""
        if self._table is None:
            width = max((len(table) for table in tables), default=0)
            rows = [[*table, *[0] * (width - len(table))] for table in tables]
            self._table = torch.tensor(rows, dtype=torch.int32).view(len(tables), width).to(self.device)
        return self._table

    def lengths(self, lengths: Sequence[int]) -> Tensor:
        """Lengths as ``[B]`` int32."""
        if self._lengths is None:
            self._lengths = torch.tensor(lengths, dtype=torch.int32).to(self.device)
        return self._lengths

    def step(self) -> None:
        """Every sequence got a token."""
        if self._lengths is not None:
            self._lengths += 1

    def forget_table(self) -> None:
        """The tables changed."""
        self._table = None

    def forget_lengths(self) -> None:
        """The lengths changed."""
        self._lengths = None

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [tensor for tensor in (self._table, self._lengths) if tensor is not None]


def blocks_of(length: int, sinks: int, tokens: int) -> int:
    """Complete blocks of a sequence with ``length`` tokens stored."""
    return max(length - sinks, 0) // tokens


def steps_left(lengths: Sequence[int], free: int, sinks: int, tokens: int) -> int:
    """Tokens that every sequence can still get, with ``free`` pages of ``tokens`` left for all of them."""
    have = sum(blocks_of(length, sinks, tokens) for length in lengths)

    def fits(steps: int) -> bool:
        return sum(blocks_of(length + steps, sinks, tokens) for length in lengths) - have <= free

    low, high = 0, sinks + (free + 1) * tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
