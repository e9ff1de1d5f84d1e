"""Bits by layer: which layers' key channels and values earn more of them, for one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.calibrate.allocation import allocate
from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers, with_layers, with_policy
from mixkvq.calibrate.sensitivity import layer_costs
from mixkvq.calibrate.trials import Trials
from mixkvq.config import MixKVQConfig
from mixkvq.policies.kivi import KIVI
from mixkvq.store import MemoryReport

#: Budgets of key channels to choose from.
KEY_BUDGETS = (2.25, 2.5, 2.84, 3.25, 3.6, 4.0)
#: Widths of values to choose from.
VALUE_BITS = (2, 3, 4, 8)

Options = list[dict[str, Any]]


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


@dataclass(frozen=True)
class Menu:
    """Options and what they cost, mean over texts.

    Attributes:
        layers: numbers of the layers.
        key_options, value_options: fields of the configuration, by rising size.
        keys, values: by layer, predicted KL of each option.
        key_bits, value_bits: honest bits per element of each.
        exact: layers whose keys get the largest option, whatever is predicted.
    """

    layers: list[int]
    key_options: Options
    value_options: Options
    keys: list[list[float]]
    values: list[list[float]]
    key_bits: list[float]
    value_bits: list[float]
    exact: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_exact(self.exact, self.layers)

    @property
    def floor(self) -> float:
        """Mean honest bits of the smallest options."""
        count, exact = len(self.layers), len(set(self.exact))
        keys = (count - exact) * min(self.key_bits) + exact * max(self.key_bits)
        return (keys / count + min(self.value_bits)) / 2

    @property
    def ceiling(self) -> float:
        """Mean honest bits of the largest."""
        return (max(self.key_bits) + max(self.value_bits)) / 2

    def choose(self, bits: float) -> Choice:
        """The best options at so many mean honest bits.

        Raises:
            CalibrationError: below the floor.
        """
        count = len(self.layers)
        if bits < self.floor:
            raise CalibrationError(self._too_few(bits))
        costs = [*self.keys, *self.values]
        sizes = [self.key_bits] * count + [self.value_bits] * count
        first = [len(self.key_bits) - 1 if layer in self.exact else 0 for layer in self.layers] + [0] * count
        found = [
            start + at
            for start, at in zip(
                first,
                allocate(_from(first, costs), _from(first, sizes), bits * 2 * count + 1e-9),
                strict=True,
            )
        ]
        return Choice(
            {
                layer: {**self.key_options[key], **self.value_options[value]}
                for layer, key, value in zip(self.layers, found[:count], found[count:], strict=True)
            },
            bits=sum(part[at] for part, at in zip(sizes, found, strict=True)) / (2 * count),
            predicted=sum(part[at] for part, at in zip(costs, found, strict=True)),
        )

    def _too_few(self, bits: float) -> str:
        words = (
            f"{bits:.3g} bits are below the floor of {self.floor:.3g}: keys of {min(KEY_BUDGETS)} code bits take "
            f"{min(self.key_bits):.3g} with scales, zeros and index, and values of {min(VALUE_BITS)} take "
            f"{min(self.value_bits):.3g}"
        )
        return f"{words}; keys of exact layers {max(self.key_bits):.3g}." if self.exact else f"{words}."


def _from(first: Sequence[int], parts: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The options of each part from its first allowed one on."""
    return [part[start:] for start, part in zip(first, parts, strict=True)]


@dataclass(frozen=True)
class Choice:
    """Fields by layer, their mean honest bits, and the KL that they are predicted to cost."""

    layers: dict[int, dict[str, Any]]
    bits: float
    predicted: float

    def config(self, base: MixKVQConfig, model: PreTrainedModel) -> MixKVQConfig:
        """``base`` with these fields, for this model."""
        return with_layers(base, self.layers, model)


def key_options(base: MixKVQConfig) -> Options:
    """What a layer's keys may have: budgets; then one width for all, in the smaller groups of ``quality``, or so many
    bits that nothing is lost. In some models a layer or two look things up, and all others rely on them.
    """
    one_width = with_policy(base, KIVI)
    return [
        *({"budget": budget} for budget in KEY_BUDGETS),
        {**one_width, "key_bits": 4, "key_group": min(64, base.key_group)},
        {**one_width, "key_bits": 8},
    ]


def value_options() -> Options:
    """What its values may have."""
    return [{"value_bits": bits} for bits in VALUE_BITS]


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


def check_exact(exact: Sequence[int], layers: Sequence[int]) -> None:
    """Refuse to keep keys of other than these layers exact.

    Raises:
        CalibrationError: one is not among them.
    """
    strange = sorted(set(exact) - set(layers))
    if strange:
        raise CalibrationError(
            f"Layer {strange[0]} is none of those whose keys are quantized: {', '.join(map(str, layers))}."
        )


def measure_menu(
    model: PreTrainedModel,
    base: MixKVQConfig,
    texts: Sequence[Text],
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
    layers = quantized_layers(model)
    totals = []
    for index, text in enumerate(texts):
        generator = torch.Generator(device=model.device).manual_seed(seed + index)
        totals.append(trials.once(text.name, partial(_measure, model, base, text, layers, generator, samples, advance)))
    keys, values = _mean(totals, [text.weight for text in texts])
    return Menu(
        layers,
        key_options(base),
        value_options(),
        keys,
        values,
        key_bits=totals[0]["key_bits"],
        value_bits=totals[0]["value_bits"],
    )


def _measure(
    model: PreTrainedModel,
    base: MixKVQConfig,
    text: Text,
    layers: list[int],
    generator: torch.Generator,
    samples: int,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """A menu of one text, as it is kept."""
    tapes = record(model, text.tokens.to(model.device), text.first, text.bounds, generator, samples)
    advance("gradients")
    keys: dict[int, list[float]] = {layer: [] for layer in layers}
    values: dict[int, list[float]] = {layer: [] for layer in layers}
    key_bits, value_bits = [], []
    widths = len(VALUE_BITS)
    for at, option in enumerate(options := key_options(base)):
        config = base.replace(**option, **value_options()[min(at, widths - 1)])
        memory = MemoryReport()
        for tape in tapes:
            costs = layer_costs(tape, config, text.bounds)
            memory += costs.memory
            for row, layer in enumerate(tape.layers):
                keys[layer].append(float(costs.keys[row]))
                values[layer].append(float(costs.values[row]))
        key_bits.append(memory.key_bits)
        value_bits.append(memory.value_bits)
        advance(f"option {at + 1} of {len(options)}")
    return {
        "keys": [keys[layer] for layer in layers],
        "values": [values[layer][:widths] for layer in layers],
        "key_bits": key_bits,
        "value_bits": value_bits[:widths],
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


def smallest(
    menu: Menu,
    tolerance: float,
    loss_of: Callable[[Choice], float],
    what: str = "the KL",
    *,
    step: float = 0.02,
    tries: int = 6,
) -> tuple[Choice, float]:
    """The choice of fewest bits whose loss, as ``loss_of`` measures it, is within a tolerance.

    A KL is a nearly constant multiple of what is predicted, so a few measurements do. Other losses are only taken to
    rise and fall with it.

    Args:
        what: the loss's name for a message.

    Raises:
        CalibrationError: not even the largest options are within it.
    """
    ratio, best = 1.0, None
    low, high = menu.floor, menu.ceiling
    for _ in range(tries):
        # Nothing is predicted to cost nothing: halve what is left.
        bits = _bits_for(menu, tolerance / ratio, low, high, step) if tolerance > 0 else (low + high) / 2
        choice = menu.choose(bits)
        loss = loss_of(choice)
        ratio = max(loss / choice.predicted, 1e-3)
        if loss <= tolerance:
            best, high = (choice, loss), min(high, choice.bits)
        else:
            low = max(low, choice.bits + step)
        if low >= high - step / 2:
            break
    if best is None:
        raise CalibrationError(
            f"No bits by layer keep {what} within {tolerance:g}: at {menu.ceiling:.2f} bits, the most that layers can "
            f"have, about {ratio * menu.choose(menu.ceiling).predicted:.2g} are predicted. Allow more."
        )
    return best


def _bits_for(menu: Menu, predicted: float, low: float, high: float, step: float) -> float:
    """The fewest bits in steps from ``low`` up whose prediction is within ``predicted``; ``high`` if none is."""
    first, last = 0, max(int((high - low) / step), 0)
    while first < last:
        middle = (first + last) // 2
        if menu.choose(low + middle * step).predicted <= predicted:
            last = middle
        else:
            first = middle + 1
    return min(low + first * step, high)
