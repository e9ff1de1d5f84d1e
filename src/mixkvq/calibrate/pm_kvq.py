"""PM-KVQ's allocation: which layers end at which width (arXiv 2505.18610, sections 3.3 and 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.calibrate.allocation import allocate
from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.calibrate.sensitivity import weighed_errors
from mixkvq.calibrate.trials import Trials
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.fidelity import appends

#: Gradients of the first tokens' losses are left out, as few tokens come before them.
FIRST = 128


def check_stretch(factor: float) -> None:
    """Refuse what positions cannot advance by.

    Raises:
        CalibrationError: it is not above 0, or no number.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise CalibrationError(f"--stretch {factor:g}: positions advance by a factor above 0.")


@contextmanager
def stretched(model: PreTrainedModel, factor: float) -> Iterator[None]:
    """While it lasts, positions advance by ``factor``, so that short texts reach as far as long ones.

    Raises:
        CalibrationError: the model has no rotary embedding.
    """
    check_stretch(factor)
    names = {name: name.rpartition(".")[2] for name, _ in model.named_buffers()}
    # Layers of different kinds have frequencies of their own; the original ones are what these are reset to.
    frequencies = [
        model.get_buffer(name)
        for name, last in names.items()
        if last.endswith("inv_freq") and not last.endswith("original_inv_freq")
    ]
    if not frequencies and factor != 1:
        raise CalibrationError(
            f"Positions are stretched by their rotary embedding, and this {model.config.model_type} model has none: "
            "give --stretch 1."
        )
    if factor != 1 and any("longrope" in str(getattr(module, "rope_type", "")) for module in model.modules()):
        raise CalibrationError(
            f"The rotary embedding of this {model.config.model_type} model sets its frequencies anew at every pass "
            "(longrope), so that positions cannot be stretched: give --stretch 1."
        )
    before = [each.clone() for each in frequencies]
    for each in frequencies:
        each.mul_(factor)
    try:
        yield
    finally:
        for each, old in zip(frequencies, before, strict=True):
            each.copy_(old)


def at_width(base: MixKVQConfig, width: int) -> MixKVQConfig:
    """How codes are made in the end by layers that come to ``width`` bits."""
    return base.replace(policy="kivi", plan_tokens=None, key_bits=width, value_bits=width)


def sensitivities(
    model: PreTrainedModel,
    base: MixKVQConfig,
    texts: Tensor,
    widths: Sequence[int],
    trials: Trials,
    *,
    stretch: float = 4,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, list[float]]:
    """``sum |dLoss/dX * (Q_b(X) - X)|`` over keys and values ``X`` of each layer, mean over texts.

    Args:
        base: how codes are made; its widths are replaced.
        texts: ``[N, T]`` tokens; the loss is that of the next token.
        widths: the options, in bits.
        trials: keep what was measured on each text.
        stretch: by how much positions advance with each token.
        advance: called after each text.

    Returns:
        By layer, the sensitivity at each width.
    """
    layers = quantized_layers(model)
    bounds = appends(texts.shape[1], base)

    def measure(tokens: Tensor) -> dict[str, Any]:
        with stretched(model, stretch):
            tapes = record(model, tokens, FIRST, bounds, None)
        found: dict[int, list[float]] = {layer: [] for layer in layers}
        for width in widths:
            for tape in tapes:
                costs = weighed_errors(
                    tape, at_width(base, width), bounds, lambda products: products.abs().sum((1, 2, 3)).mean()
                )
                for row, layer in enumerate(tape.layers):
                    found[layer].append(float(costs.keys[row] + costs.values[row]))
        return {"sensitivities": [found[layer] for layer in layers]}

    total = torch.zeros(len(layers), len(widths), dtype=torch.float64)
    for at, tokens in enumerate(texts.to(model.device)):
        kept = trials.once(f"window {at}", partial(measure, tokens))
        total += torch.tensor(kept["sensitivities"], dtype=torch.float64) / len(texts)
        advance()
    return dict(zip(layers, total.tolist(), strict=True))


def check_goal(mean: float, widths: Sequence[int], bits: Sequence[float]) -> None:
    """Refuse a goal that not even the smallest width reaches.

    Args:
        mean: honest bits of a full cache.
        bits: honest bits of each width.

    Raises:
        CalibrationError: it is below the floor, or no number.
    """
    floor = min(bits)
    if not mean >= floor:
        raise CalibrationError(
            f"{mean:.3g} bits are below the floor of {floor:.3g}: {min(widths)}-bit codes with their scales and zeros."
        )


def last_widths(
    found: dict[int, list[float]], bits: Sequence[float], widths: Sequence[int], mean: float
) -> dict[int, int]:
    """Each layer's last width: the least summed sensitivity at a mean of so many honest bits.

    Raises:
        CalibrationError: not even the smallest widths are within it.
    """
    check_goal(mean, widths, bits)
    chosen = allocate(list(found.values()), [list(bits)] * len(found), min(mean, max(bits)) * len(found) + 1e-9)
    return {layer: widths[at] for layer, at in zip(found, chosen, strict=True)}
