"""Policy, quantizer, store and kernels put together, free of any framework: the cache of a layer, or of all layers.

A :class:`LayerCache` grows with its tokens, an :class:`EvictingCache` up to a number of them. A :class:`ModelCache`
holds all layers in tensors of a fixed size, as CUDA graphs want them.
"""

from mixkvq.config import MixKVQConfig
from mixkvq.layers.evicting import EvictingCache
from mixkvq.layers.grouped import GroupedCache, new_model_cache
from mixkvq.layers.growing import LayerCache
from mixkvq.layers.static import ModelCache
from mixkvq.layers.step import Step
from mixkvq.policies import EvictingPolicy, Policy

__all__ = ["EvictingCache", "GroupedCache", "LayerCache", "ModelCache", "Step", "new_layer_cache", "new_model_cache"]


def new_layer_cache(config: MixKVQConfig, policy: Policy, like: Step) -> LayerCache | EvictingCache:
    """The growing cache that a policy wants for one layer; ``like`` is the first step."""
    if isinstance(policy, EvictingPolicy):
        return EvictingCache(config, policy, like)
    return LayerCache(config, policy, like)
