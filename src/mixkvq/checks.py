"""What the fields of a configuration must be, and must not contradict."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mixkvq.config import MixKVQConfig
    from mixkvq.policies import Policy

#: Width of the channels that a budget promotes.
PROMOTED_BITS = 4
#: Widths that codes can have; 16 stands for "not quantized, the model's own type".
BITS = (2, 3, 4, 8, 16)
#: The largest share of numbers that are kept as outliers: each costs 32 bits.
MAX_OUTLIERS = 0.1
#: The largest share of the context that is kept as it is: wide layers keep twice as much.
MAX_RECENT = 0.4
#: Damping below which a covariance of few queries cannot be factored in float32.
MIN_DAMPING = 1e-3


class ConfigError(ValueError):
    """A configuration that contradicts itself, or names something that does not exist."""


def check(config: MixKVQConfig) -> None:
    """Refuse a configuration, settings by layer left aside.

    Raises:
        ConfigError: a field is not what it should be, or fields contradict each other or the policy.
    """
    from mixkvq.policies import policy_class

    _check_types(config)
    _check_sizes(config)
    _check_tiers(config)
    _check_channels(config)
    _check_eviction(config)
    policy = policy_class(config.policy)
    _check_owners(config, policy)
    policy.check(config)
    promotes = bool(policy(config).promoted_bits)
    _check_key_axis(config, promotes=promotes)
    _check_levels(config)
    _check_irregular(config, promotes=promotes)
    _check_key_rope(config, promotes=promotes)


def join(choices: Iterable[Any]) -> str:
    """Choices as a message lists them."""
    return ", ".join(str(choice) for choice in choices)


def _require(condition: bool, rule: str, config: MixKVQConfig, field: str) -> None:
    if not condition:
        raise ConfigError(f"{rule}; {field}={getattr(config, field)!r} was given.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_types(config: MixKVQConfig) -> None:
    for field in ("residual_length", "sinks", "key_bits", "key_group", "value_bits", "value_group"):
        _require(_is_whole(getattr(config, field)), f"{field} is a whole number", config, field)
    for field in ("budget", "tau_uint4", "tau_bf16", "key_feedback"):
        value = getattr(config, field)
        _require(value is None or _is_real(value), f"{field} is a finite number or none", config, field)
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if typing.get_origin(hint) is Literal:
            allowed = typing.get_args(hint)
            _require(value in allowed, f"{field} is one of {join(allowed)}", config, field)
        elif hint is bool:
            _require(isinstance(value, bool), f"{field} is true or false", config, field)
    _require(isinstance(config.policy, str), "policy is a name", config, "policy")
    _require(config.model is None or isinstance(config.model, str), "model is a text or none", config, "model")
    _require(isinstance(config.layers, (list, tuple)), "layers is a list of fields for each layer", config, "layers")


def _check_sizes(config: MixKVQConfig) -> None:
    size = config.residual_length
    _require(
        size >= 16 and size % 16 == 0,
        "residual_length is a multiple of 16 (tokens fill whole words)",
        config,
        "residual_length",
    )
    _require(
        config.key_axis == "token" or (config.key_group >= 1 and size % config.key_group == 0),
        f"key_group divides residual_length ({size})",
        config,
        "key_group",
    )
    _require(config.key_group >= 1, "key_group is at least 1", config, "key_group")
    _require(config.value_group >= 1, "value_group is at least 1", config, "value_group")
    _require(config.sinks >= 0, "sinks is 0 or more tokens", config, "sinks")
    if config.plan_tokens is not None:
        _require(
            _is_whole(config.plan_tokens) and config.plan_tokens >= size,
            f"plan_tokens is a whole number of tokens, at least residual_length ({size}), or none",
            config,
            "plan_tokens",
        )
    _require(
        _is_real(config.recent) and 0 <= config.recent <= MAX_RECENT,
        f"recent is a share from 0 to {MAX_RECENT}",
        config,
        "recent",
    )
    for field in ("key_bits", "value_bits"):
        _require(getattr(config, field) in BITS, f"{field} is one of {join(BITS)}", config, field)


def _check_tiers(config: MixKVQConfig) -> None:
    _require(
        config.key_feedback is None or config.key_feedback >= MIN_DAMPING,
        f"key_feedback is at least {MIN_DAMPING} or none (without damping, few queries have no inverse)",
        config,
        "key_feedback",
    )
    if config.budget is None:
        return
    _require(
        config.key_bits <= config.budget <= PROMOTED_BITS,
        f"budget lies between key_bits ({config.key_bits}) and {PROMOTED_BITS}, the promoted width",
        config,
        "budget",
    )
    if config.tau_uint4 is not None or config.tau_bf16 is not None:
        raise ConfigError(
            "budget and thresholds (tau_uint4, tau_bf16) are two ways to plan the same tiers: give one. "
            "To switch a preset over, set the other to none."
        )


def _check_owners(config: MixKVQConfig, policy: type[Policy]) -> None:
    """Refuse fields of other policies."""
    from mixkvq.policies import POLICIES

    owned = frozenset[str]().union(*(other.fields for other in POLICIES.values()))
    for field in config.changed:
        if field in owned - policy.fields:
            owners = join(name for name, other in sorted(POLICIES.items()) if field in other.fields)
            raise ConfigError(
                f"The {config.policy} policy has no {field}, which is for {owners}: leave it out, or use a preset "
                "with another policy (`mixkvq caches`)."
            )


def _check_channels(config: MixKVQConfig) -> None:
    if config.channels is None:
        return
    heads = config.channels if isinstance(config.channels, (list, tuple)) else [None]
    valid = all(
        isinstance(head, (list, tuple))
        and all(_is_whole(channel) and channel >= 0 for channel in head)
        and len({*head}) == len(head)
        for head in heads
    )
    _require(valid, "channels is none, or for every KV head a list of channel numbers, each once", config, "channels")


def _check_key_axis(config: MixKVQConfig, *, promotes: bool) -> None:
    if config.key_axis == "channel":
        if config.key_rotation != "none":
            raise ConfigError(
                "key_rotation spreads a token's outliers over its channels, which then share a scale: it takes "
                f"key_axis='token', not {config.key_axis!r}."
            )
        return
    if promotes:
        raise ConfigError(
            f"key_axis='token' gives the channels of a token one scale, and the {config.policy} policy promotes "
            "single channels: use key_axis='channel', or a policy that promotes none."
        )
    if config.key_feedback is not None:
        raise ConfigError(
            "key_feedback moves errors between channels that have scales of their own, and with key_axis='token' "
            "they share one: set key_feedback to none, or key_axis to 'channel'."
        )


def _check_key_rope(config: MixKVQConfig, *, promotes: bool) -> None:
    if config.key_rope == "after":
        return
    reason = "looks at queries, which have RoPE: set key_rope to 'after', or"
    if promotes:
        raise ConfigError(f"The {config.policy} policy {reason} use one that promotes no channels.")
    if config.key_feedback is not None:
        raise ConfigError(f"key_feedback {reason} key_feedback to none.")


def _check_levels(config: MixKVQConfig) -> None:
    for kind, bits in (("key", config.key_bits), ("value", config.value_bits)):
        given = getattr(config, f"{kind}_levels")
        if given is None:
            continue
        rising = isinstance(given, (list, tuple)) and all(map(_is_real, given)) and sorted({*given}) == [*given]
        _require(
            rising and bits != BITS[-1] and len(given) == 2**bits and given[0] >= 0 and given[-1] < 2**bits,
            f"{kind}_levels is none, or for {bits} bits a list of {2**bits} rising numbers from 0 to {2**bits - 1}",
            config,
            f"{kind}_levels",
        )
        if getattr(config, f"{kind}_clip") or getattr(config, f"{kind}_unbiased"):
            raise ConfigError(
                f"{kind}_levels are made for the whole range of a group: set {kind}_clip and {kind}_unbiased to false."
            )


def _check_irregular(config: MixKVQConfig, *, promotes: bool) -> None:
    """Refuse what does not go with levels or outliers."""
    _require(
        _is_real(config.outliers) and 0 <= config.outliers <= MAX_OUTLIERS,
        f"outliers is a share from 0 to {MAX_OUTLIERS}",
        config,
        "outliers",
    )
    if config.outliers and "hadamard" in (config.key_rotation, config.value_rotation):
        raise ConfigError("A rotation spreads outliers, and outliers keeps them apart: use one of the two.")
    field = "key_levels" if config.key_levels is not None else "outliers" if config.outliers else None
    if field and promotes:
        raise ConfigError(f"{field} takes a policy that promotes no channels, unlike {config.policy}.")
    if field and config.key_feedback is not None:
        raise ConfigError(f"{field} takes keys that are rounded each for itself: set key_feedback to none.")


def _check_eviction(config: MixKVQConfig) -> None:
    for field in ("keep", "keep_confident"):
        value = getattr(config, field)
        whole = _is_whole(value) and value >= 1
        _require(value is None or whole, f"{field} is a whole number of tokens, at least 1, or none", config, field)
    for field in ("confidence", "mass_share"):
        value = getattr(config, field)
        _require(_is_real(value) and 0 <= value <= 1, f"{field} lies between 0 and 1", config, field)
    decay = config.keep_decay
    _require(_is_real(decay) and 0 < decay <= 1, "keep_decay is above 0 and at most 1", config, "keep_decay")
    whole = _is_whole(config.protected) and config.protected >= 1
    _require(whole, "protected is a whole number of tokens, at least 1", config, "protected")
