"""What a model's attention mask says of the new tokens."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from mixkvq.adapters.transformers.support import UnsupportedModelError

#: Additive masks hide a token with this or less: the largest number that is in use for it.
HIDDEN = -1e4


class MaskReader:
    """Reads a forward pass's mask once for all layers: reading it may wait for the device."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._real: Tensor | None = None

    def read(self, mask: Tensor | None, batch: int, length: int) -> tuple[Tensor | None, Tensor | None]:
        """Which of ``length`` new tokens sees which, and which are real, for a batch of ``batch``.

        Args:
            mask: ``[B, 1, L, T]``, bool or additive with 0 and very negative numbers, or None: causal, no padding.

        Returns:
            ``visible [B, L, L]`` and ``real [B, L]``, bool; None for a plain causal one, and where all are real. A
            token is real if it sees itself.
        """
        if mask is None:
            return None, None
        if mask.dim() != 4 or mask.shape[1] != 1:
            raise UnsupportedModelError(
                f"The packed cache takes masks of shape [batch, 1, queries, keys], not {list(mask.shape)}."
            )
        visible = to_bool(mask)[:, 0, :, -length:]
        if self._mask is None or self._mask() is not mask:
            # A copy: a view would keep the whole mask alive.
            real = visible.diagonal(dim1=1, dim2=2).clone()
            self._real = None if bool(real.all()) else real
            self._mask = weakref.ref(mask)
        return visible, None if self._real is None else self._real.expand(batch, -1)


def to_bool(mask: Tensor) -> Tensor:
    """A mask as bool, True where a token is seen."""
    if mask.dtype == torch.bool:
        return mask
    shown, hidden = mask == 0, mask <= HIDDEN
    if not bool((shown | hidden).all()):
        raise UnsupportedModelError("The packed cache does not take attention biases, only masks of 0 and -infinity.")
    return shown
