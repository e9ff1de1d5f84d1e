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
from mixkvq.adapters.transformers.support import model_shape
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.config import PROMOTED_BITS, MixKVQConfig
from mixkvq.evaluate.fidelity import appends
from mixkvq.models import attention
from mixkvq.policies import KeyBlock
from mixkvq.policies.bf16 import BF16
from mixkvq.policies.mixkvq import MixKVQ
from mixkvq.policies.ranked import BASE_BITS
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
        extra = self.uint4_share * (PROMOTED_BITS - BASE_BITS) + self.bf16_share * (DENSE_BITS - BASE_BITS)
        return BASE_BITS + extra

    def config(self, model: PreTrainedModel) -> MixKVQConfig:
        """The preset ``paper`` with these, for this model."""
        thresholds = {"tau_bf16": self.tau_bf16, "tau_uint4": self.tau_uint4}
        return MixKVQConfig.preset("paper", **thresholds, model=model_shape(model.config))


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
def measured_saliences(model: PreTrainedModel, windows: Tensor, advance: Callable[[], None] = lambda: None) -> Tensor:
    """Saliences of all key channels in all blocks of a full-precision pass, the largest first: ``[N]``.

    Args:
        model: any that :class:`MixKVQCache` supports.
        windows: ``[N, W]`` tokens of calibration text.
        advance: called after each window.

    Raises:
        CalibrationError: the windows do not hold a block.
    """
    config = MixKVQConfig.preset("paper")
    if windows.shape[1] < config.residual_length:
        raise CalibrationError(
            f"Windows of {windows.shape[1]} tokens do not hold a block of {config.residual_length}: take longer ones."
        )
    recorder = SalienceRecorder(config)
    with attention(model, NAME):
        for window in windows.to(model.device):
            cache = MixKVQCache(model.config, recorder.config, policy=recorder)
            for start, stop in appends(len(window), config):
                model(window[None, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
            advance()
    return torch.cat(recorder.saliences).sort(descending=True).values


def at_shares(ranked: Tensor, bf16_share: float, uint4_share: float) -> Thresholds:
    """The quantiles of :func:`measured_saliences` that leave these shares of channels above them."""
    last = len(ranked) - 1
    first, second = (min(int(share * len(ranked)), last) for share in (bf16_share, bf16_share + uint4_share))
    return Thresholds(ranked[first].item(), ranked[second].item(), first / len(ranked), (second - first) / len(ranked))


def uint4_share_for(bits: float, bf16_share: float) -> float:
    """The share of channels in UINT4 with which the tiers come to ``bits`` code bits.

    Raises:
        CalibrationError: there is none.
    """
    if not (0 <= bf16_share < 1):
        raise CalibrationError(f"A share of {bf16_share} in BF16: the share is at least 0 and below 1.")
    share = (bits - BASE_BITS - bf16_share * (DENSE_BITS - BASE_BITS)) / (PROMOTED_BITS - BASE_BITS)
    if not (0 <= share <= 1 - bf16_share):
        least = BASE_BITS + bf16_share * (DENSE_BITS - BASE_BITS)
        most = least + (1 - bf16_share) * (PROMOTED_BITS - BASE_BITS)
        raise CalibrationError(
            f"{bits} bits with {bf16_share:.1%} of the channels in BF16 would take {share:.1%} in UINT4. "
            f"Choose bits between {least:.2f} and {most:.2f}."
        )
    return share


def largest_shares(bits: float) -> dict[str, float]:
    """The shares of channels in BF16 and in UINT4 that would each spend ``bits`` code bits alone.

    A search over shares up to these has half of its points within the bits, and the others up to twice as far above 2.

    Raises:
        CalibrationError: nothing can be promoted.
    """
    if not BASE_BITS < bits <= DENSE_BITS:
        raise CalibrationError(f"{bits} bits: channels have {BASE_BITS} to {DENSE_BITS}, so choose bits in between.")
    widths = {"bf16_share": DENSE_BITS, "uint4_share": PROMOTED_BITS}
    return {name: min((bits - BASE_BITS) / (width - BASE_BITS), 1) for name, width in widths.items()}
