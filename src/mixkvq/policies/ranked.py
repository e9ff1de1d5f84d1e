"""What policies share that rank channels by a score and promote from the top."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from mixkvq.config import PROMOTED_BITS, ConfigError, MixKVQConfig
from mixkvq.policies.base import KeyBlock, Policy
from mixkvq.policies.tiers import promote_top, promoted_count

#: Width that channels are promoted from.
BASE_BITS = 2


class RankedPolicy(Policy):
    """Promotes the channels with the highest :meth:`score` from 2 to 4 bits, within the configuration's budget."""

    fields = frozenset({"budget", "budget_scope"})

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        if config.key_bits != BASE_BITS:
            raise ConfigError(f"The {cls.name} policy promotes channels above key_bits=2, not {config.key_bits}.")

    @property
    def promoted_bits(self) -> tuple[int, ...]:
        return (PROMOTED_BITS,)

    def promoted_channels(self, kv_heads: int, head_dim: int) -> dict[int, int] | None:
        config = self.config
        assert config.budget is not None
        count = promoted_count(kv_heads, head_dim, config.key_bits, config.budget, config.budget_scope)
        return {PROMOTED_BITS: count}

    @abstractmethod
    def score(self, block: KeyBlock) -> Tensor:
        """What channels are ranked by: ``[N, Hkv, D]``."""

    def plan(self, block: KeyBlock) -> Tensor:
        config = self.config
        assert config.budget is not None
        return promote_top(self.score(block), config.key_bits, config.budget, config.budget_scope)
