"""KIVI (ICML 2024, arXiv 2402.02750): keys per channel, values per token, one width for all."""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.config import Preset
from mixkvq.policies.base import KeyBlock, PlanRule, Policy
from mixkvq.policies.refined import OURS, REFINED

SOURCE = "KIVI, arXiv 2402.02750"


class KIVI(Policy):
    """Every channel has ``key_bits``.

    Differs from the paper in one point: values leave the residual together with the keys of their block, while
    KIVI's newest R values stay in full precision as a sliding window.
    """

    name = "kivi"
    presets = {  # noqa: RUF012
        "kivi-2": Preset("2 bits for all keys and values, groups of 32", SOURCE, {"policy": "kivi"}),
        "kivi-4": Preset(
            "4 bits for all keys and values, groups of 32",
            SOURCE,
            {"policy": "kivi", "key_bits": 4, "value_bits": 4},
        ),
        "quality": Preset(
            "4 bits for all keys, 2 for values, refined as in `default`: when answers matter more than memory",
            OURS,
            {**REFINED, "policy": "kivi", "key_bits": 4, "key_group": 64},
        ),
    }

    @property
    def rule(self) -> PlanRule | None:
        return PlanRule("none")

    def plan(self, block: KeyBlock) -> Tensor:
        n, heads, _, dim = block.keys.shape
        return torch.full((n, heads, dim), self.config.key_bits, dtype=torch.uint8, device=block.keys.device)
