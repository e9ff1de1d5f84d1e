"""KVQuant's levels of each layer: k-means over its groups' numbers, weighed by how much an error there costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.adapters.transformers.rope import rope_of
from mixkvq.calibrate.capture import Tape, record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.config import MixKVQConfig
from mixkvq.layers.recipe import LayerShape, Recipe
from mixkvq.policies import policy_class
from mixkvq.quant.block import DENSE_BITS, QuantizedKeys, QuantizedValues
from mixkvq.quant.levels import Levels, count, fit_levels, new_histogram, steps
from mixkvq.quant.rope import Rope


def check_base(base: MixKVQConfig) -> None:
    """Refuse a configuration that cannot have levels.

    Raises:
        ConfigError: of what does not go with levels.
        CalibrationError: it does not quantize keys or values, rotates them, or has settings by layer.
    """
    if DENSE_BITS in (base.key_bits, base.value_bits):
        raise CalibrationError("Levels are of codes, and this cache leaves keys or values as they are: choose another.")
    base.replace(**{f"{kind}_levels": tuple(range(1 << getattr(base, f"{kind}_bits"))) for kind in ("key", "value")})
    if "hadamard" in (base.key_rotation, base.value_rotation):
        raise CalibrationError("Levels are calibrated for keys and values as they are: set both rotations to none.")
    if base.layers:
        raise CalibrationError("This cache has settings by layer already: start from a preset.")


def layer_levels(
    model: PreTrainedModel,
    texts: Tensor,
    base: MixKVQConfig,
    bounds: Sequence[tuple[int, int]],
    first: int,
    generator: torch.Generator,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, Levels]]:
    """``key_levels`` and ``value_levels`` of every layer, by its number.

    Args:
        texts: ``[N, T]`` tokens.
        bounds, first: as :func:`mixkvq.calibrate.capture.record` has them.
        advance: called after each text.
    """
    text = model.config.get_text_config(decoder=True)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for tokens in texts:
        for tape in record(model, tokens.to(model.device), first, bounds, generator):
            for row, layer in enumerate(tape.layers):
                histograms = found.setdefault(layer, (new_histogram(base.key_bits), new_histogram(base.value_bits)))
                rope = rope_of(text, layer) if base.key_rope == "before" else None
                count_layer(tape, row, base, histograms, rope)
        advance()
    return {
        layer: {"key_levels": fit_levels(keys, base.key_bits), "value_levels": fit_levels(values, base.value_bits)}
        for layer, (keys, values) in found.items()
    }


@torch.inference_mode()
def count_layer(
    tape: Tape, row: int, config: MixKVQConfig, histograms: tuple[Tensor, Tensor], rope: Rope | None = None
) -> None:
    """Count where the keys and values of a layer's blocks lie in their groups, but for outliers.

    A number weighs what an error of one step there costs: the square of its gradient times its group's scale.

    Args:
        rope: the layer's, if keys are quantized before it. Their gradients are turned back as they are.
    """
    blocks = (tape.keys.shape[2] - config.sinks) // config.residual_length
    if not blocks:
        return
    where = slice(config.sinks, config.sinks + blocks * config.residual_length)

    def cut(x: Tensor) -> Tensor:
        """``[Hkv, T, D]`` to ``[blocks, Hkv, R, D]``."""
        return x[:, where].unflatten(1, (blocks, -1)).transpose(0, 1)

    all_keys, gradients = tape.keys[row], tape.key_gradients[:, row]
    if rope is not None:
        start = torch.zeros(1, device=all_keys.device)
        all_keys, gradients = rope.undo(all_keys[None], start)[0], rope.undo(gradients, start)
    keys, values = cut(all_keys), cut(tape.values[row])
    config = config.replace(key_rope="after")  # they are without it
    recipe = Recipe.of(config, policy_class(config.policy)(config), LayerShape.of(tape.keys, tape.values))
    packed_keys, packed_values = recipe.quantize(keys, values, recipe.plan(keys, None), None)
    key_weight, value_weight = (cut(x.square().mean(0)) for x in (gradients, tape.value_gradients[:, row]))
    _count_blocks(histograms[0], keys, packed_keys, key_weight)
    _count_blocks(histograms[1], values, packed_values, value_weight)


def _count_blocks(histogram: Tensor, x: Tensor, q: QuantizedKeys | QuantizedValues, weight: Tensor) -> None:
    scale, zero = (_spread(part, x) for part in (q.scale, q.zero))
    weight = weight * scale.square()
    if q.outliers is not None:
        weight = weight.flatten(2).scatter(2, q.outliers.at, 0.0).view_as(x)
    count(histogram, steps(x, scale, zero), weight)


def _spread(part: Tensor, x: Tensor) -> Tensor:
    """A scale or zero of every group as one of every number."""
    for dim in (2, 3):
        part = part.repeat_interleave(x.shape[dim] // part.shape[dim], dim)
    return part
