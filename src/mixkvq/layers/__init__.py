"""Policy, quantizer, store and kernels put together, free of any framework: the cache of a layer, or of all layers.

A :class:`LayerCache` grows with its tokens. A :class:`ModelCache` holds all layers in tensors of a fixed size, as CUDA
graphs want them.
"""

from mixkvq.layers.grouped import GroupedCache, new_model_cache
from mixkvq.layers.growing import LayerCache
from mixkvq.layers.static import ModelCache
from mixkvq.layers.step import Step

__all__ = ["GroupedCache", "LayerCache", "ModelCache", "Step", "new_model_cache"]
