"""Attention masks: how they are made, and what they say of the new tokens."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.store.books import CacheFullError

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
            ``visible [B, L, L]`` and ``real [B, L]``, bool; None for a plain causal one or a single token, and where
            all are real. A token is real if it sees itself.
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
            itself = visible.diagonal(dim1=1, dim2=2).clone()
            self._real = None if bool(itself.all()) else itself
            self._mask = weakref.ref(mask)
        real = None if self._real is None else self._real.expand(batch, -1)
        # A single token that does not see itself is padding, and nobody reads its output.
        return None if length == 1 else visible, real


def to_bool(mask: Tensor) -> Tensor:
    """A mask as bool, True where a token is seen."""
    if mask.dtype == torch.bool:
        return mask
    shown, hidden = mask == 0, mask <= HIDDEN
    if not bool((shown | hidden).all()):
        raise UnsupportedModelError("The packed cache does not take attention biases, only masks of 0 and -infinity.")
    return shown


def mark_positions(positions: Tensor) -> None:
    """Mark the tensor of positions seen of a statically shaped cache, which :func:`build_mask` recognises."""
    positions._mixkvq_static = True  # type: ignore[attr-defined]
    torch._dynamo.mark_static_address(positions)


def build_mask(
    *, q_length: int, kv_length: int, q_offset: int | Tensor = 0, attention_mask: Tensor | None = None, **others: Any
) -> Tensor | None:
    """The mask function of ``attn_implementation="mixkvq"``: :func:`transformers.masking_utils.sdpa_mask`.

    A single token on a :class:`MixKVQStaticCache` needs none, as lengths are the cache's to know: it gets a constant.
    ``kv_length`` is then the number of positions that there is room for.

    Raises:
        CacheFullError: ``attention_mask [B, positions]`` says that there is no room for this one.
    """
    if q_length == 1 and getattr(q_offset, "_mixkvq_static", False):
        if attention_mask is not None and attention_mask.shape[-1] > kv_length:
            raise CacheFullError(
                f"The cache is full: it has room for {kv_length:,} positions of each sequence, and this would be "
                f"number {attention_mask.shape[-1]:,}. Give it a larger max_tokens or max_bytes, or reset() it."
            )
        return _sees_itself(q_offset.device)  # type: ignore[union-attr]
    return sdpa_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask, **others)  # type: ignore[arg-type]


@functools.cache
def _sees_itself(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    torch._dynamo.mark_static_address(mask)
    return mask
