"""The key channels of each layer that are most salient over a text, to be promoted in every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixkvq.adapters.transformers.attention import attention_forward
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers, with_policy
from mixkvq.calibrate.observe import observed
from mixkvq.config import PROMOTED_BITS, MixKVQConfig
from mixkvq.policies import KeyBlock
from mixkvq.policies.frozen import Frozen
from mixkvq.policies.mixkvq import MixKVQ
from mixkvq.policies.tiers import promote_top
from mixkvq.quant.salience import QueryStatistics


def check_base(base: MixKVQConfig) -> None:
    """Refuse a configuration that ranks no channels, or not alike in all layers.

    Raises:
        CalibrationError: it does not.
    """
    if base.policy != MixKVQ.name or base.budget is None or base.layers:
        raise CalibrationError(
            "Channels are frozen for a cache that ranks them within a budget, such as default, and alike in all layers."
        )


@torch.inference_mode()
def mean_saliences(
    model: PreTrainedModel, windows: Tensor, base: MixKVQConfig, advance: Callable[[], None] = lambda: None
) -> dict[int, Tensor]:
    """``A_d [Hkv, D]`` of every layer, mean over the blocks of full-precision passes.

    The queries of a block's importance are those of its whole window.

    Args:
        windows: ``[N, W]`` tokens.
        base: of the policy ``mixkvq``.
        advance: called after each window.

    Raises:
        CalibrationError: the configuration ranks no channels, or the windows do not hold a block.
    """
    check_base(base)
    if windows.shape[1] < base.sinks + base.residual_length:
        raise CalibrationError(
            f"Windows of {windows.shape[1]} tokens do not hold {base.sinks} sinks and a block of "
            f"{base.residual_length}: take longer ones."
        )
    observer = _Observer(quantized_layers(model), base)
    with observed(model, observer):
        for window in windows.to(model.device):
            model(window[None], use_cache=False, logits_to_keep=1)
            advance()
    return {layer: total / observer.blocks[layer] for layer, total in observer.totals.items()}


class _Observer:
    """Sums of saliences by layer."""

    def __init__(self, layers: Sequence[int], base: MixKVQConfig) -> None:
        self.layers, self.base, self.policy = layers, base, MixKVQ(base)
        self.totals: dict[int, Tensor] = {}
        self.blocks: dict[int, int] = dict.fromkeys(layers, 0)

    def attend(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        size, sinks = self.base.residual_length, self.base.sinks
        count = (key.shape[2] - sinks) // size
        blocks = key[0, :, sinks : sinks + count * size].unflatten(1, (count, size)).transpose(0, 1)
        seen = QueryStatistics(1, key.shape[1], key.shape[3], key.device)
        seen.update(query)
        scores = self.policy.score(KeyBlock(blocks.float(), seen.importance().expand(count, -1, -1)))
        self.totals[layer] = self.totals.get(layer, 0) + scores.sum(0).cpu()
        self.blocks[layer] += count
        return attention_forward(module, query, key, value, None, **options)[0]


def frozen_channels(saliences: dict[int, Tensor], base: MixKVQConfig) -> dict[int, dict[str, Any]]:
    """Fields of each layer: the most salient channels, as many as the budget of ``base`` affords, by KV head."""
    assert base.budget is not None
    fields = {}
    for layer, salience in saliences.items():
        chosen = promote_top(salience[None], base.key_bits, base.budget, base.budget_scope)[0] == PROMOTED_BITS
        channels = tuple(tuple(head.nonzero().flatten().tolist()) for head in chosen)
        fields[layer] = {**with_policy(base, Frozen), "channels": channels}
    return fields
