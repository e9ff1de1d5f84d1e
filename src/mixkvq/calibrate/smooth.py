"""SmoothAttention: the sizes of key channels are moved into the queries, by the weights (PM-KVQ, arXiv 2505.18610).

Keys that are quantized per token suffer from channels that are larger than the others. Both channels of a RoPE pair are
divided by ``max|K|^alpha`` of the pair, and the same channels of the queries multiplied: logits stay what they were, as
a rotation within a pair commutes with a factor of the pair. To keys that are quantized per channel it makes no
difference: their scales take up the factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixkvq.calibrate.capture import Tape, record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.fidelity import appends
from mixkvq.kernels.partial import causal
from mixkvq.kernels.reference import attention as attend
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import LayerCache, Step
from mixkvq.policies import policy_class

#: Exponents to choose from.
ALPHAS = tuple(i / 20 for i in range(20))
#: The last queries of a text, whose attention is compared.
COMPARED = 64
#: Largest relative change of logits that rounding of the weights' type may cause.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def smooth_attention(
    model: PreTrainedModel, text: Tensor, config: MixKVQConfig, advance: Callable[[], None] = lambda: None
) -> dict[int, float]:
    """Fold SmoothAttention into a model's weights, in place.

    Args:
        text: ``[T]`` tokens to look at.
        config: what keys and values are stored by; codes are made at its last widths.
        advance: called after each layer.

    Returns:
        The exponent of each layer, the one of :data:`ALPHAS` whose attention outputs are nearest to exact ones.

    Raises:
        CalibrationError: queries and keys have no linear projections of their own right before RoPE, or the model's
            logits would change.
    """
    projections = {layer: _projections(model, layer) for layer in quantized_layers(model)}
    with torch.no_grad():
        before = model(text[None], use_cache=False).logits
    alphas = {}
    for tape in record(model, text, 1, appends(len(text), config), None):
        for row, layer in enumerate(tape.layers):
            sizes = pair_sizes(tape.keys[row])
            alphas[layer] = _best(tape, row, sizes, config.for_layer(layer))
            fold(*projections[layer], sizes ** alphas[layer])
            advance()
    with torch.no_grad():
        after = model(text[None], use_cache=False).logits
    change = float((after - before).norm() / before.norm())
    if not change <= TOLERANCE[model.dtype]:
        raise CalibrationError(
            f"SmoothAttention changed this {model.config.model_type} model's logits by {change:.1%}: its rotary "
            "embedding does not turn channel d together with channel d + D/2. Load the model again."
        )
    return alphas


def fold(query: nn.Linear, key: nn.Linear, factors: Tensor) -> None:
    """Divide keys by ``factors [Hkv, D / 2]``, channels ``d`` and ``d + D / 2`` alike, and multiply queries by them."""
    both = torch.cat([factors, factors], 1)
    group = query.out_features // key.out_features
    for linear, by in ((key, 1 / both), (query, both.repeat_interleave(group, 0))):
        for parameter in filter(lambda each: each is not None, (linear.weight, linear.bias)):
            shape = (-1, *[1] * (parameter.dim() - 1))
            parameter.data.mul_(by.flatten().view(shape).to(parameter))


def _projections(model: PreTrainedModel, layer: int) -> tuple[nn.Linear, nn.Linear]:
    for module in model.modules():
        if getattr(module, "layer_idx", None) != layer:
            continue
        found = getattr(module, "q_proj", None), getattr(module, "k_proj", None)
        if all(isinstance(each, nn.Linear) and each.weight.is_floating_point() for each in found) and not hasattr(
            module, "k_norm"
        ):
            return found  # type: ignore[return-value]
    raise CalibrationError(
        f"SmoothAttention is folded into q_proj and k_proj, and layer {layer} of this {model.config.model_type} model "
        "has no such linear layers, in a floating-point type and right before RoPE (a norm between them has weights "
        "that heads share)."
    )


def pair_sizes(keys: Tensor) -> Tensor:
    """``max|K|`` of every RoPE pair, ``[Hkv, D / 2]``, from keys ``[Hkv, T, D]``."""
    largest = keys.float().abs().amax(1)
    return largest.unflatten(1, (2, -1)).amax(1).clamp(min=torch.finfo(torch.float16).tiny)


@torch.inference_mode()
def _best(tape: Tape, row: int, sizes: Tensor, config: MixKVQConfig) -> float:
    """The exponent with which one layer's last queries come nearest to what exact keys and values give them."""
    own = config.replace(policy="kivi", plan_tokens=None)
    query, keys, values = (part[row : row + 1] for part in (tape.query, tape.keys, tape.values))
    query, length = query[:, :, -COMPARED:], keys.shape[2]
    visible = causal(query.shape[2], length, query.device)
    group = query.shape[1] // keys.shape[1]

    def outputs(keys: Tensor, values: Tensor, factors: Tensor) -> Tensor:
        scaled = query[0] * factors.repeat_interleave(group, 0)[:, None]
        return attend(scaled, keys, values, visible, **tape.attention[row])

    ones = torch.ones(keys.shape[1], keys.shape[3], device=keys.device)
    exact = outputs(keys[0], values[0], ones)
    errors = []
    for alpha in ALPHAS:
        factors = torch.cat([sizes**alpha] * 2, 1)
        cache = LayerCache(own, policy_class(own.policy)(own), step := Step(query, keys / factors[:, None], values))
        cache.append(step)
        errors.append(float((outputs(*_tokens(cache), factors) - exact).square().mean()))
    return ALPHAS[errors.index(min(errors))]


def _tokens(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values ``[Hkv, T, D]`` of the only sequence of a cache, as they are stored."""
    packed, dense = cache.store.packed(), cache.store.dense()
    assert packed is not None
    sinks = cache.store.sinks
    stored = zip(dequantize_pages(packed, 0, rotated=cache.rotated), (dense.keys[0], dense.values[0]), strict=True)
    keys, values = (torch.cat([own[:, :sinks].float(), page, own[:, sinks:].float()], 1) for page, own in stored)
    return keys, values
