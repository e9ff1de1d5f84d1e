"""Which cache a layer gets."""

from __future__ import annotations

from mixkvq.config import MixKVQConfig
from mixkvq.layers.evicting import EvictingCache
from mixkvq.layers.growing import LayerCache
from mixkvq.layers.narrowing import NarrowingCache
from mixkvq.layers.step import Step
from mixkvq.policies import EvictingPolicy, Policy
from mixkvq.quant.rope import Rope


def new_layer_cache(
    config: MixKVQConfig, policy: Policy, like: Step, rope: Rope | None = None
) -> LayerCache | EvictingCache:
    """The growing cache of one layer that a policy needs, for steps like ``like``; ``rope`` as LayerCache has it."""
    if isinstance(policy, EvictingPolicy):
        return EvictingCache(config, policy, like)
    return NarrowingCache(config, policy, like) if policy.narrows else LayerCache(config, policy, like, rope)
