"""Which cache a layer gets."""

from __future__ import annotations

from mixkvq.config import MixKVQConfig
from mixkvq.layers.growing import LayerCache
from mixkvq.layers.narrowing import NarrowingCache
from mixkvq.layers.step import Step
from mixkvq.policies import Policy


def new_layer_cache(config: MixKVQConfig, policy: Policy, like: Step) -> LayerCache:
    """The growing cache of one layer that a policy needs, for steps like ``like``."""
    kind = NarrowingCache if policy.narrows else LayerCache
    return kind(config, policy, like)
