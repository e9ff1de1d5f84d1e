"""Rotary position embedding (RoPE), taken back from keys before they are quantized, and applied when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The rotation of a layer's keys: pair ``i`` of the channels of token ``t`` is turned by ``t * inv_freq[i]``.

    It is orthogonal: keys that are turned back and forth are the same up to rounding, whatever the angles.

    Attributes:
        inv_freq: radians per token of each of n pairs. Channels from ``2 n`` on are not turned; with no pairs, none is.
        interleaved: whether the pairs are channels ``(2 i, 2 i + 1)`` or, as in Llama, ``(i, i + n)``.
    """

    inv_freq: tuple[float, ...] = ()
    interleaved: bool = False

    @classmethod
    def of_base(cls, dim: int, base: float = 10000.0) -> Rope:
        """RoPE as in Llama, over all ``dim`` channels: ``inv_freq[i] = base^(-2 i / dim)``."""
        return cls(tuple(base ** (-2 * i / dim) for i in range(dim // 2)))

    def apply(self, x: Tensor, first: Tensor) -> Tensor:
        """RoPE of blocks.

        Args:
            x: ``[N, Hkv, T, D]``.
            first: ``[N]``, the number in its sequence of each block's first token.

        Returns:
            ``[N, Hkv, T, D]`` float32.
        """
        return self._turned(x, first, 1.0)

    def undo(self, x: Tensor, first: Tensor) -> Tensor:
        """The inverse of :meth:`apply`."""
        return self._turned(x, first, -1.0)

    def _turned(self, x: Tensor, first: Tensor, sign: float) -> Tensor:
        x, pairs = x.float(), len(self.inv_freq)
        token = first.view(-1, 1, 1, 1) + torch.arange(x.shape[2], device=x.device)[:, None]
        angle = token.float() * _frequencies(self.inv_freq, x.device)
        cos, sin = angle.cos(), angle.sin() * sign
        one, other = slice(pairs), slice(pairs, 2 * pairs)
        if self.interleaved:
            one, other = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        a, b = x[..., one], x[..., other]
        turned = x.clone()
        turned[..., one], turned[..., other] = a * cos - b * sin, b * cos + a * sin
        return turned


@lru_cache(maxsize=32)
def _frequencies(inv_freq: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(inv_freq, dtype=torch.float32, device=device)
