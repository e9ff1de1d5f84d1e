"""Kitty (arXiv 2511.18643): the channels with the largest mean magnitude get 4 bits."""

from __future__ import annotations

from torch import Tensor

from mixkvq.config import ConfigError, MixKVQConfig, Preset
from mixkvq.policies.base import KeyBlock, PlanRule
from mixkvq.policies.ranked import RankedPolicy

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


class Kitty(RankedPolicy):
    """Per page and KV head, the channels with the largest mean ``|K|`` are promoted; queries are not looked at."""

    name = "kitty"
    presets = {  # noqa: RUF012
        "kitty": Preset("12.5% of each head's key channels at 4 bits", SOURCE, {**FIELDS, "budget": 2.25}),
        "kitty-pro": Preset("25% of each head's key channels at 4 bits", SOURCE, {**FIELDS, "budget": 2.5}),
    }

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        super().check(config)
        if config.budget is None:
            raise ConfigError("The kitty policy needs a budget.")

    @property
    def rule(self) -> PlanRule:
        return PlanRule("magnitude", budget=self.config.budget, scope=self.config.budget_scope)

    def score(self, block: KeyBlock) -> Tensor:
        return block.keys.abs().mean(2, dtype=block.keys.dtype)
