"""What storing a layer's keys or values in some way costs, predicted from gradients of a full-precision pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixkvq.calibrate.capture import Tape
from mixkvq.config import MixKVQConfig
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import LayerCache, Step
from mixkvq.policies import policy_class


@dataclass(frozen=True)
class LayerCosts:
    """What quantizing each layer alone costs, keys and values apart; of :func:`layer_costs`, in nats per token.

    Attributes:
        keys, values: ``[layers]``.
    """

    keys: Tensor
    values: Tensor


#: What gradient times error of one layer, ``[samples, Hkv, T, D]``, comes to: a number.
Measure = Callable[[Tensor], Tensor]


def layer_costs(tape: Tape, config: MixKVQConfig, bounds: Sequence[tuple[int, int]]) -> LayerCosts:
    """Predicted KL, from half the expected square of gradient times error, which it is to second order.

    Errors of different blocks of tokens and of different heads are taken to be independent, which averages over many
    more products than there are samples.

    Args:
        bounds: the appends that tokens are stored in; those of the recording.
    """

    def kl(products: Tensor) -> Tensor:
        effects = products.unflatten(2, (-1, config.residual_length)).sum((3, 4))
        return effects.square().sum((1, 2)).mean() / (2 * tape.scored)

    return weighed_errors(tape, config, bounds, kl)


@torch.inference_mode()
def weighed_errors(tape: Tape, config: MixKVQConfig, bounds: Sequence[tuple[int, int]], measure: Measure) -> LayerCosts:
    """Store a tape's keys and values as ``config`` says, in the real packed format, and weigh the errors."""
    steps = (Step(tape.query[:, :, a:b], tape.keys[:, :, a:b], tape.values[:, :, a:b]) for a, b in bounds)
    first = next(steps)
    cache = LayerCache(config, policy_class(config.policy)(config), first)  # layers are the rows of a batch
    cache.append(first)
    for step in steps:
        cache.append(step)
    packed = cache.store.packed()
    assert packed is not None
    costs = torch.zeros(2, len(tape.layers))
    for row in range(len(tape.layers)):
        parts = zip(
            dequantize_pages(packed, row, rotated=cache.rotated),
            (tape.keys[row], tape.values[row]),
            (tape.key_gradients[:, row], tape.value_gradients[:, row]),
            strict=True,
        )
        for at, (stored, exact, gradients) in enumerate(parts):
            where = slice(config.sinks, config.sinks + stored.shape[1])
            costs[at, row] = measure(gradients[:, :, where] * (stored - exact[:, where])).cpu()
    return LayerCosts(costs[0], costs[1])
