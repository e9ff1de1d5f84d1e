"""The attention function, and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.adapters.transformers.handle import KVHandle
from mixkvq.adapters.transformers.masks import build_mask, to_bool
from mixkvq.kernels.partial import causal, dense_attention, merge, sink_rows

#: ``attn_implementation`` of a model that is to use the cache.
NAME = "mixkvq"

logger = logging.get_logger(__name__)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``attn_implementation="mixkvq"``: packed attention for handles, the library's own for plain tensors.

    Args:
        module: the attention module.
        query: ``[B, Hq, L, D]`` after RoPE.
        key, value: handles of a quantized layer, or tensors ``[B, Hkv, T, D]``.
        attention_mask: from :func:`.masks.build_mask`.
        scaling: see :func:`logit_scaling`.
        softcap: soft cap of the logits (Gemma 2).
        s_aux: ``[Hq]`` attention sink logits (GPT-OSS).

    Returns:
        ``[B, L, Hq, D]``, and None: attention weights are not available.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError("The packed cache does not take attention biases (position_bias).")
    if kwargs.get("output_attentions"):
        logger.warning_once("attn_implementation='mixkvq' does not return attention weights.")
    scaling = logit_scaling(query, scaling)
    if isinstance(key, KVHandle):
        assert isinstance(value, KVHandle)
        tensors = query, key.tensor, value.tensor
        output = key.layer.attend(module, *tensors, attention_mask, scaling, softcap=softcap, sinks=s_aux)
        return output.contiguous(), None
    assert isinstance(value, Tensor)
    _warn_if_stock(module, query, key)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, length, _ = query.shape
    kv_heads, total = key.shape[1:3]
    visible = None
    if attention_mask is not None:
        visible = to_bool(attention_mask)[:, :, None]
    elif length > 1:
        visible = causal(length, total, query.device)
    rows = (query.float() * scaling).unflatten(1, (kv_heads, heads // kv_heads))
    part = dense_attention(rows, key, value, visible, softcap)
    output = merge([part], sink_rows(s_aux, kv_heads, length)).view(batch, heads, length, -1)
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def logit_scaling(query: Tensor, scaling: float | None) -> float:
    """The factor of the logits of ``query [..., D]``: what the model says, or ``D ** -0.5`` if that is None."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _warn_if_stock(module: nn.Module, query: Tensor, key: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    has_past = key.shape[2] > query.shape[2] and not getattr(module, "is_cross_attention", False)
    if has_past and not hasattr(key, "_mixkvq"):
        logger.warning_once(
            "attn_implementation='mixkvq' is running with a stock cache: nothing is being quantized. Pass "
            "past_key_values=MixKVQCache(model.config, MixKVQConfig.preset('default'))."
        )


def register() -> None:
    """Make ``attn_implementation="mixkvq"`` known to transformers. Importing :mod:`mixkvq` does it."""
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name every mask would be None, and left padding silently wrong.
    AttentionMaskInterface.register(NAME, build_mask)
