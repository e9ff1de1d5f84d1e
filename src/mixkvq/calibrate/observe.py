"""Attention of a full-precision pass, layer by layer in the hands of whoever measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from mixkvq.adapters.transformers.attention import attention_forward
from mixkvq.adapters.transformers.masks import build_mask
from mixkvq.models import attention

NAME = "mixkvq_observed"


class Observer(Protocol):
    """Computes the attention of some layers itself.

    Attributes:
        layers: their numbers in the model; all others attend as they do.
    """

    layers: Sequence[int]

    def attend(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Causal attention of ``query [B, Hq, T, D]`` over ``key, value [B, Hkv, T, D]``: ``[B, T, Hq, D]``.

        Args:
            options: of :func:`mixkvq.adapters.transformers.attention.attention_forward`.
        """


_current: Observer | None = None


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Passes without a cache go through ``observer`` for a while."""
    global _current
    _current = observer
    try:
        with attention(model, NAME):
            yield
    finally:
        _current = None


def _observe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    layer: Any = module.layer_idx
    if _current is None or layer not in _current.layers:
        return attention_forward(module, query, key, value, mask, **options)
    return _current.attend(layer, module, query, key, value, options), None


AttentionInterface.register(NAME, _observe)
AttentionMaskInterface.register(NAME, build_mask)
