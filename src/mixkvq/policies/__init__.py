"""Who decides the bits: one file a system, one short class each, all of them in this registry."""

from mixkvq.policies.base import KeyBlock, PlanRule, Policy
from mixkvq.policies.bf16 import BF16
from mixkvq.policies.conf_kv import ConfKV
from mixkvq.policies.evicting import EvictingPolicy
from mixkvq.policies.frozen import Frozen
from mixkvq.policies.kitty import Kitty
from mixkvq.policies.kivi import KIVI
from mixkvq.policies.kvmix import KVmix
from mixkvq.policies.kvquant import KVQuant
from mixkvq.policies.kvtuner import KVTuner
from mixkvq.policies.mixkvq import MixKVQ
from mixkvq.policies.pm_kvq import PMKVQ
from mixkvq.policies.rotate_kv import RotateKV
from mixkvq.policies.window import Window

#: Adding a policy is one file and one line here; the CLI, the fidelity table and the tests' matrix follow.
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (MixKVQ, KIVI, Kitty, KVmix, KVTuner, PMKVQ, ConfKV, Window, RotateKV, KVQuant, Frozen, BF16)
}


def policy_class(name: str) -> type[Policy]:
    """A policy by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in POLICIES:
        from mixkvq.config import ConfigError

        raise ConfigError(f"There is no policy '{name}'. Known: {', '.join(sorted(POLICIES))}.")
    return POLICIES[name]


__all__ = ["POLICIES", "EvictingPolicy", "KeyBlock", "PlanRule", "Policy", "policy_class"]
