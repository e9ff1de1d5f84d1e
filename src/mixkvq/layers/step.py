"""What a forward pass brings to a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """New tokens of one forward pass: ``query [B, Hq, L, D]``, ``keys, values [B, Hkv, L, D]`` after RoPE.

    ``real [B, L]`` bool is False at padding; None if all tokens are real.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    real: Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def tokens(self, start: int, stop: int) -> Step:
        """The tokens ``start`` to ``stop``."""
        real = None if self.real is None else self.real[:, start:stop]
        part = slice(start, stop)
        return Step(self.query[:, :, part], self.keys[:, :, part], self.values[:, :, part], real)

    def copy(self) -> Step:
        """The same tokens in memory of their own, outside any gradient."""
        query, keys, values = (x.detach().clone() for x in (self.query, self.keys, self.values))
        return Step(query, keys, values, self.real)
