"""MixKVQ (arXiv 2512.19206): channels that are hard to quantize and used by the queries get more bits."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mixkvq.config import PROMOTED_BITS, ConfigError, MixKVQConfig, Preset
from mixkvq.policies.base import KeyBlock, PlanRule
from mixkvq.policies.ranked import RankedPolicy
from mixkvq.policies.refined import OURS, REFINED
from mixkvq.policies.tiers import promote_above
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.salience import sensitivity

PAPER = "MixKVQ, arXiv 2512.19206"

#: Thresholds by model, as found in the paper by a search on GSM8K: (tau_bf16, tau_uint4).
PAPER_THRESHOLDS = {
    "r1-llama-8b": (1.44, 0.79),
    "r1-qwen-7b": (0.63, 0.41),
    "r1-qwen-14b": (1.52, 1.60),
    "r1-qwen-32b": (1.85, 1.58),
}


class MixKVQ(RankedPolicy):
    """Ranks channels by ``A_d = I_d * S_d``; thresholds or a budget cut the ranking into tiers."""

    name = "mixkvq"
    fields = RankedPolicy.fields | {"tau_uint4", "tau_bf16", "salience"}
    presets = {  # noqa: RUF012 - shared on purpose
        "default": Preset(
            "what to run: a bit budget, query-aware ranking and error feedback, rotated values",
            OURS,
            {**REFINED, "budget": 2.84, "key_group": 128},
        ),
        "paper": Preset(
            "the paper's method; thresholds for 2.3 code bits on SmolLM2-135M, set your model's",
            PAPER,
            {"tau_bf16": 10.27, "tau_uint4": 3.214},
        ),
        **{
            f"paper-{model}": Preset(
                f"the paper's method with its thresholds for DeepSeek-{model.upper()}",
                f"{PAPER}, hyper-parameters",
                {"tau_bf16": tau_bf16, "tau_uint4": tau_uint4},
            )
            for model, (tau_bf16, tau_uint4) in PAPER_THRESHOLDS.items()
        },
    }

    @property
    def uses_queries(self) -> bool:  # type: ignore[override]
        return self.config.salience == "query"

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        super().check(config)
        if config.budget is None and (config.tau_uint4 is None or config.tau_bf16 is None):
            raise ConfigError("The mixkvq policy needs a budget, or both tau_uint4 and tau_bf16.")

    @property
    def thresholds(self) -> dict[int, float] | None:
        """Thresholds by width, or None where there is a budget instead."""
        if self.config.budget is not None:
            return None
        assert self.config.tau_uint4 is not None
        assert self.config.tau_bf16 is not None
        return {PROMOTED_BITS: self.config.tau_uint4, DENSE_BITS: self.config.tau_bf16}

    @property
    def promoted_bits(self) -> tuple[int, ...]:
        return super().promoted_bits if self.thresholds is None else tuple(self.thresholds)

    def promoted_channels(self, kv_heads: int, head_dim: int) -> dict[int, int] | None:
        return super().promoted_channels(kv_heads, head_dim) if self.thresholds is None else None

    @property
    def rule(self) -> PlanRule:
        score: Literal["salience", "error"] = "salience" if self.uses_queries else "error"
        return PlanRule(score, self.config.budget, self.config.budget_scope, self.thresholds)

    def score(self, block: KeyBlock) -> Tensor:
        """``A_d [N, Hkv, D]``, or ``S_d`` alone for the ablation without the query."""
        error = sensitivity(block.keys, self.config.key_group, self.config.key_bits)
        return error if block.importance is None else block.importance * error

    def plan(self, block: KeyBlock) -> Tensor:
        if self.thresholds is None:
            return super().plan(block)
        return promote_above(self.score(block), self.config.key_bits, self.thresholds)
