"""A decode step's attention as one opaque operator, which ``torch.compile`` neither looks into nor copies tensors for.

The cache is not among its arguments: it is found by the address of a small tensor, the *anchor*. So a compiled model
serves any cache, and a CUDA graph, which holds addresses, belongs to one cache alone.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from mixkvq.adapters.transformers.support import check_finite
from mixkvq.layers import GroupedCache, ModelCache, Step

#: Anchors are never freed: a graph that was recorded for a cache must not be replayed for a later one whose anchor
#: happens to get the same address.
_ANCHORS: list[Tensor] = []
_CACHES: dict[int, weakref.ref[ModelCache | GroupedCache]] = {}


def new_anchor(cache: ModelCache | GroupedCache, device: torch.device) -> Tensor:
    """A tensor by which :func:`attend` finds the cache from now on."""
    with torch.inference_mode(False):
        anchor = torch.zeros(1, dtype=torch.int32, device=device)
    torch._dynamo.mark_static_address(anchor)
    _ANCHORS.append(anchor)
    _CACHES[anchor.data_ptr()] = weakref.ref(cache)
    return anchor


@torch.library.custom_op("mixkvq::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchor: Tensor,
    layer: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """:meth:`mixkvq.static.ModelCache.decode` of the anchor's cache, with the output as ``[B, L, Hq, D]``."""
    found = _CACHES.get(anchor.data_ptr())
    cache = None if found is None else found()
    if cache is None:
        raise RuntimeError("The cache of this attention step does not exist any more.")
    check_finite(cache.config, key, value)
    step = Step(query, key, value)
    output = cache.decode(layer, step, scaling=scaling, softcap=softcap, sinks=sinks)
    return output.transpose(1, 2).contiguous()


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchor: Tensor,
    layer: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3])
