"""Tokens in the model's type: the sinks of every sequence, and its residual after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixkvq.store.layout import PageLayout


class DenseSlots:
    """Slots for the sinks and the residual of B sequences; the residual has room for whole blocks, for one at least.

    Attributes:
        keys, values: ``[B, Hkv, slots, D]``. Slots that no token is in hold finite numbers.
    """

    def __init__(self, layout: PageLayout, batch: int, sinks: int, device: torch.device) -> None:
        self.sinks, self.size = sinks, layout.tokens
        # Zeros, because masked slots are multiplied by a probability of zero, which would not silence a NaN.
        shape = (batch, layout.kv_heads, sinks + layout.tokens)
        self.keys = torch.zeros(*shape, layout.key_dim, dtype=layout.dense_dtype, device=device)
        self.values = torch.zeros(*shape, layout.value_dim, dtype=layout.dense_dtype, device=device)

    @property
    def count(self) -> int:
        """Slots of every sequence."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def grow(self, used: int) -> None:
        """Make room for sequences that use so many slots."""
        more = self._fitting(used) - self.count
        if more > 0:
            self.keys, self.values = (pad(dense, (0, 0, 0, more)) for dense in (self.keys, self.values))

    def shrink(self, used: int) -> None:
        """Give memory back when more than a quarter of the slots is not needed for that."""
        fitting = self._fitting(used)
        if 4 * fitting < 3 * self.count:
            self.keys, self.values = (dense[:, :, :fitting].clone() for dense in (self.keys, self.values))

    def _fitting(self, used: int) -> int:
        return self.sinks + max(-(-(used - self.sinks) // self.size), 1) * self.size

    def put(self, row: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Write tokens ``[Hkv, n, D]`` of a sequence from a slot on."""
        stop = slot + keys.shape[1]
        self.keys[row, :, slot:stop] = keys
        self.values[row, :, slot:stop] = values

    def put_one(self, slots: Tensor | int, keys: Tensor, values: Tensor) -> None:
        """Write a token of every sequence, ``[B, Hkv, D]``, to slots ``[B]``, or to the same one."""
        if isinstance(slots, int):
            self.keys[:, :, slots], self.values[:, :, slots] = keys, values
            return
        rows = torch.arange(len(slots), device=slots.device)
        self.keys[rows, :, slots] = keys.to(self.keys.dtype)
        self.values[rows, :, slots] = values.to(self.values.dtype)

    def take(self, rows: Sequence[int], blocks: int, filled: int) -> tuple[Tensor, Tensor]:
        """The oldest blocks of some residuals, ``[rows * blocks, Hkv, R, D]``; what is left moves to the front.

        Args:
            filled: slots that the longest of these sequences uses.
        """
        keys, values = (self._take(dense, list(rows), blocks, filled) for dense in (self.keys, self.values))
        return keys, values

    def _take(self, dense: Tensor, rows: list[int], blocks: int, filled: int) -> Tensor:
        first, stop = self.sinks, self.sinks + blocks * self.size
        oldest = dense[rows, :, first:stop]
        dense[rows, :, first : first + filled - stop] = dense[rows, :, stop:filled]
        return oldest.unflatten(2, (blocks, self.size)).transpose(1, 2).flatten(0, 1)

    def select(self, rows: Tensor) -> None:
        """Keep the given batch rows ``[N]`` int64."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def clear(self, row: int, start: int) -> None:
        """Forget what is in a sequence's slots from ``start`` on: it may be anything, and must be finite."""
        self.keys[row, :, start:] = 0
        self.values[row, :, start:] = 0
