"""Kitty (arXiv 2511.18643): the channels with the largest mean magnitude get 4 bits."""

from __future__ import annotations

from torch import Tensor

from mixkvq.config import ConfigError, MixKVQConfig, Preset
from mixkvq.policies.base import KeyBlock, Policy
from mixkvq.policies.tiers import promote_top, promoted_count

SOURCE = "Kitty, arXiv 2511.18643"
#: Kitty quantizes a value vector as one group: wider than any head dimension.
WHOLE_HEAD = 1024
FIELDS = {
    "policy": "kitty",
    "sinks": 32,
    "key_group": 128,
    "value_group": WHOLE_HEAD,
    "budget_scope": "head",
}


class Kitty(Policy):
    """Per page and KV head, the channels with the largest mean ``|K|`` are promoted; queries are not looked at."""

    name = "kitty"
    presets = {  # noqa: RUF012
        "kitty": Preset("12.5% of each head's key channels at 4 bits", SOURCE, {**FIELDS, "budget": 2.25}),
        "kitty-pro": Preset("25% of each head's key channels at 4 bits", SOURCE, {**FIELDS, "budget": 2.5}),
    }

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        if config.key_bits != 2 or config.budget is None:
            raise ConfigError("The kitty policy promotes channels from key_bits=2 within a budget.")

    @property
    def promoted_bits(self) -> tuple[int, ...]:
        return (4,)

    def promoted_channels(self, kv_heads: int, head_dim: int) -> dict[int, int] | None:
        config = self.config
        assert config.budget is not None
        count = promoted_count(kv_heads, head_dim, config.key_bits, 4, config.budget, config.budget_scope)
        return {4: count}

    def plan(self, block: KeyBlock) -> Tensor:
        assert self.config.budget is not None
        score = block.keys.abs().mean(2, dtype=block.keys.dtype)
        return promote_top(score, self.config.key_bits, 4, self.config.budget, self.config.budget_scope)
