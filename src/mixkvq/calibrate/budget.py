"""What bits by layer would cost one model: predictions for every option, from gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.menu import Menu, Sizes, option_configs
from mixkvq.calibrate.sensitivity import layer_costs
from mixkvq.calibrate.trials import Trials
from mixkvq.config import MixKVQConfig


@dataclass(frozen=True)
class Text:
    """Tokens to calibrate on.

    Attributes:
        name: by which its measurements are kept.
        tokens: ``[T]``.
        bounds: appends that they are fed to a cache in.
        first: the first position whose prediction is scored.
        weight: how much it counts.
    """

    name: str
    tokens: Tensor
    bounds: list[tuple[int, int]]
    first: int
    weight: float = 1


def check_base(base: MixKVQConfig) -> None:
    """Refuse a configuration whose layers cannot have budgets.

    Raises:
        CalibrationError: it has none itself, or has settings by layer already.
    """
    if base.budget is None or base.layers:
        raise CalibrationError(
            "Bits by layer are found for a cache with a budget of key channels, such as default, and without settings "
            "by layer."
        )


def measure_menu(
    model: PreTrainedModel,
    base: MixKVQConfig,
    texts: Sequence[Text],
    sizes: Sizes,
    trials: Trials,
    *,
    seed: int = 0,
    samples: int = 2,
    advance: Callable[[str], None] = lambda _: None,
) -> Menu:
    """Predict what every option costs in every layer, from gradients of passes over ``texts``.

    Every option is packed in the real format. What was measured is kept in ``trials``.
    """
    check_base(base)
    totals = []
    for index, text in enumerate(texts):
        generator = torch.Generator(device=model.device).manual_seed(seed + index)
        totals.append(trials.once(text.name, partial(_measure, model, base, text, sizes, generator, samples, advance)))
    keys, values = _mean(totals, [text.weight for text in texts])
    return Menu(sizes, keys, values)


def _measure(
    model: PreTrainedModel,
    base: MixKVQConfig,
    text: Text,
    sizes: Sizes,
    generator: torch.Generator,
    samples: int,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """A menu of one text, as it is kept."""
    tapes = record(model, text.tokens.to(model.device), text.first, text.bounds, generator, samples)
    advance("gradients")
    keys: dict[int, list[float]] = {layer: [] for layer in sizes.layers}
    values: dict[int, list[float]] = {layer: [] for layer in sizes.layers}
    configs = option_configs(base)
    for at, config in enumerate(configs):
        for tape in tapes:
            costs = layer_costs(tape, config, text.bounds)
            for row, layer in enumerate(tape.layers):
                keys[layer].append(float(costs.keys[row]))
                values[layer].append(float(costs.values[row]))
        advance(f"option {at + 1} of {len(configs)}")
    return {
        "keys": [keys[layer] for layer in sizes.layers],
        "values": [values[layer][: len(sizes.value_options)] for layer in sizes.layers],
    }


def _mean(texts: Sequence[dict[str, Any]], weights: Sequence[float]) -> tuple[list[list[float]], list[list[float]]]:
    """The mean of keys and values over texts.

    None counts more for costing more: where a model is sure of itself, its KL is a thousandth of what it is elsewhere,
    and which layers matter is no less true there.
    """
    keys, values = (torch.tensor([text[part] for text in texts], dtype=torch.float64) for part in ("keys", "values"))
    sums = keys.sum((1, 2)) + values.sum((1, 2))
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    scale = (share * (share * sums).sum() / sums.clamp(min=torch.finfo(sums.dtype).tiny))[:, None, None]
    return (keys * scale).sum(0).tolist(), (values * scale).sum(0).tolist()
