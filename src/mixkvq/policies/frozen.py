"""Key channels that are chosen once for a model, instead of for every block: what ``calibrate channels`` writes."""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.config import PROMOTED_BITS, ConfigError, MixKVQConfig
from mixkvq.policies.base import KeyBlock, Policy
from mixkvq.policies.ranked import BASE_BITS


class Frozen(Policy):
    """Promotes the same ``channels`` of every KV head from 2 to 4 bits in all blocks.

    No query is watched, and no block ranked. It is a layer's policy in a calibration, not a preset.
    """

    name = "frozen"
    fields = frozenset({"channels"})
    presets = {}  # noqa: RUF012

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        if config.channels is None:
            raise ConfigError("The frozen policy needs channels, those of each KV head that get 4 bits.")
        if config.key_bits != BASE_BITS:
            raise ConfigError(f"The frozen policy promotes channels above key_bits=2, not {config.key_bits}.")

    @property
    def promoted_bits(self) -> tuple[int, ...]:
        return (PROMOTED_BITS,)

    def promoted_channels(self, kv_heads: int, head_dim: int) -> dict[int, int]:
        return {PROMOTED_BITS: sum(len(head) for head in self._channels(kv_heads, head_dim))}

    def plan(self, block: KeyBlock) -> Tensor:
        count, heads, _, dim = block.keys.shape
        bits = torch.full((heads, dim), BASE_BITS, dtype=torch.uint8)
        for head, channels in enumerate(self._channels(heads, dim)):
            bits[head, list(channels)] = PROMOTED_BITS
        return bits.to(block.keys.device).expand(count, -1, -1)

    def _channels(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        channels = self.config.channels
        assert channels is not None
        if len(channels) != kv_heads or max((max(head, default=0) for head in channels), default=0) >= head_dim:
            raise ConfigError(
                f"These channels are not those of a layer with {kv_heads} KV heads of dimension {head_dim}: they name "
                f"{len(channels)} heads."
            )
        return channels
