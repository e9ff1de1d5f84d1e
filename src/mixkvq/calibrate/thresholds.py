"""Thresholds for the paper's tiers, from quantiles of a model's own saliences.

Saliences differ from model to model by an order of magnitude, so thresholds do not transfer; shares of channels do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.adapters.transformers import NAME, MixKVQCache
from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.evaluate.fidelity import appends
from mixkvq.models import attention
from mixkvq.policies import KeyBlock
from mixkvq.policies.bf16 import BF16
from mixkvq.policies.mixkvq import MixKVQ
from mixkvq.quant.block import DENSE_BITS


@dataclass(frozen=True)
class Thresholds:
    """Thresholds and the shares of channels that lay above them."""

    tau_bf16: float
    tau_uint4: float
    bf16_share: float
    uint4_share: float

    @property
    def bits(self) -> float:
        """Mean code bits of a key channel."""
        return 2 + self.uint4_share * (4 - 2) + self.bf16_share * (DENSE_BITS - 2)


class SalienceRecorder(BF16):
    """Quantizes nothing, and writes down what MixKVQ would rank by."""

    uses_queries = True

    def __init__(self, config: MixKVQConfig) -> None:
        super().__init__(MixKVQConfig.preset("bf16", residual_length=config.residual_length))
        self.ranked = MixKVQ(config)
        self.saliences: list[Tensor] = []

    def plan(self, block: KeyBlock) -> Tensor:
        self.saliences.append(self.ranked.score(block).flatten().cpu())
        return super().plan(block)


@torch.inference_mode()
def thresholds_for_bits(
    model: PreTrainedModel,
    windows: Tensor,
    bits: float,
    bf16_share: float = 0.01,
    advance: Callable[[], None] = lambda: None,
) -> Thresholds:
    """Thresholds at which the ``paper`` preset spends ``bits`` code bits on a key channel.

    Args:
        model: any that :class:`MixKVQCache` supports.
        windows: ``[N, W]`` tokens of calibration text.
        bits: mean code bits wanted.
        bf16_share: share of channels to leave in BF16; UINT4 takes the rest of the bits.
        advance: called after each window.
    """
    block = MixKVQConfig.preset("paper").residual_length
    if not (0 <= bf16_share < 1) or windows.shape[1] < block:
        raise ConfigError(
            f"A share of {bf16_share} in BF16 over windows of {windows.shape[1]} tokens: the share is at least 0 and "
            f"below 1, and a window holds a block of {block} tokens."
        )
    uint4_share = (bits - 2 - bf16_share * (DENSE_BITS - 2)) / 2
    if not (0 <= uint4_share <= 1 - bf16_share):
        raise ConfigError(
            f"{bits} bits with {bf16_share:.1%} of the channels in BF16 would take {uint4_share:.1%} in UINT4. "
            f"Choose bits between {2 + bf16_share * 14:.2f} and {4 + bf16_share * 12:.2f}."
        )
    config = MixKVQConfig.preset("paper")
    recorder = SalienceRecorder(config)
    with attention(model, NAME):
        for window in windows.to(model.device):
            cache = MixKVQCache(model.config, recorder.config, policy=recorder)
            for start, stop in appends(len(window), config):
                model(window[None, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
            advance()
    ranked = torch.cat(recorder.saliences).sort(descending=True).values
    first, second = (min(int(share * len(ranked)), len(ranked) - 1) for share in (bf16_share, bf16_share + uint4_share))
    return Thresholds(ranked[first].item(), ranked[second].item(), first / len(ranked), (second - first) / len(ranked))
