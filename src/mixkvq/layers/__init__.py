"""Policy, quantizer, store and kernels put together, free of any framework: the cache of a layer, or of all layers.

A :class:`LayerCache` grows with its tokens, an :class:`EvictingCache` up to a number of them;
:func:`new_layer_cache` makes the kind that a policy needs. A :class:`ModelCache` holds all layers in tensors of a fixed
size, as CUDA graphs want them.
"""

from mixkvq.layers.evicting import EvictingCache
from mixkvq.layers.grouped import GroupedCache, LayerSettings, new_model_cache
from mixkvq.layers.growing import LayerCache
from mixkvq.layers.kinds import new_layer_cache
from mixkvq.layers.static import ModelCache
from mixkvq.layers.step import Step

__all__ = [
    "EvictingCache",
    "GroupedCache",
    "LayerCache",
    "LayerSettings",
    "ModelCache",
    "Step",
    "new_layer_cache",
    "new_model_cache",
]
