"""Bits by layer, to choose from: options of a layer's keys and values, their sizes, and the best choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.calibrate.allocation import allocate
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import packed_memory, quantized_layers, with_layers, with_policy
from mixkvq.config import MixKVQConfig
from mixkvq.policies.kivi import KIVI

#: Budgets of key channels to choose from.
KEY_BUDGETS = (2.25, 2.5, 2.84, 3.25, 3.6, 4.0)
#: Widths of values to choose from.
VALUE_BITS = (2, 3, 4, 8)

Options = list[dict[str, Any]]


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


def option_configs(base: MixKVQConfig) -> list[MixKVQConfig]:
    """Every option of keys, each with an option of values beside it until all of those are there."""
    values = value_options()
    return [base.replace(**keys, **values[min(at, len(values) - 1)]) for at, keys in enumerate(key_options(base))]


@dataclass(frozen=True)
class Sizes:
    """Options, and what they take.

    Attributes:
        layers: numbers of the layers.
        key_options, value_options: fields of the configuration, by rising size.
        key_bits, value_bits: honest bits per element of each.
        exact: layers whose keys get the largest option, whatever is predicted.
    """

    layers: list[int]
    key_options: Options
    value_options: Options
    key_bits: list[float]
    value_bits: list[float]
    exact: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        strange = sorted(set(self.exact) - set(self.layers))
        if strange:
            raise CalibrationError(
                f"Layer {strange[0]} is none of those whose keys are quantized: {', '.join(map(str, self.layers))}."
            )

    @classmethod
    def of(cls, model: PreTrainedModel, base: MixKVQConfig, tokens: Tensor, exact: Sequence[int] = ()) -> Sizes:
        """Sizes in the cache of a model, of :func:`key_options` and :func:`value_options`.

        Args:
            tokens: as :func:`mixkvq.calibrate.layers.packed_memory` has them; sizes do not depend on which.

        Raises:
            CalibrationError: keys of a layer in ``exact`` are not quantized.
        """
        values = value_options()
        # Refuses layers before it measures.
        unmeasured = cls(quantized_layers(model), key_options(base), values, [], [], tuple(exact))
        packed = [packed_memory(model, config, tokens) for config in option_configs(base)]
        return replace(
            unmeasured,
            key_bits=[memory.key_bits for memory in packed],
            value_bits=[memory.value_bits for memory in packed[: len(values)]],
        )

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

    def check(self, bits: float) -> None:
        """Refuse a goal that not even the smallest options reach.

        Raises:
            CalibrationError: it is below the floor, or no number.
        """
        if bits >= self.floor:
            return
        words = (
            f"{bits:.3g} bits are below the floor of {self.floor:.3g}: keys of {min(KEY_BUDGETS)} code bits take "
            f"{min(self.key_bits):.3g} with scales, zeros and index, and values of {min(VALUE_BITS)} take "
            f"{min(self.value_bits):.3g}"
        )
        raise CalibrationError(
            f"{words}; keys of exact layers {max(self.key_bits):.3g}." if self.exact else f"{words}."
        )


@dataclass(frozen=True)
class Menu:
    """Options, their sizes, and what they cost.

    Attributes:
        keys, values: by layer, predicted KL of each option, mean over texts.
    """

    sizes: Sizes
    keys: list[list[float]]
    values: list[list[float]]

    def choose(self, bits: float) -> Choice:
        """The best options at so many mean honest bits.

        Raises:
            CalibrationError: below the floor.
        """
        self.sizes.check(bits)
        bits = min(bits, self.sizes.ceiling)
        layers, count = self.sizes.layers, len(self.sizes.layers)
        costs = [*self.keys, *self.values]
        sizes = [self.sizes.key_bits] * count + [self.sizes.value_bits] * count
        largest = len(self.sizes.key_bits) - 1
        first = [largest if layer in self.sizes.exact else 0 for layer in layers] + [0] * count
        allowed = allocate(_from(first, costs), _from(first, sizes), bits * 2 * count + 1e-9)
        found = [start + at for start, at in zip(first, allowed, strict=True)]
        return Choice(
            {
                layer: {**self.sizes.key_options[key], **self.sizes.value_options[value]}
                for layer, key, value in zip(layers, found[:count], found[count:], strict=True)
            },
            bits=sum(part[at] for part, at in zip(sizes, found, strict=True)) / (2 * count),
            predicted=sum(part[at] for part, at in zip(costs, found, strict=True)),
        )


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
    low, high = menu.sizes.floor, menu.sizes.ceiling
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
        most = menu.sizes.ceiling
        raise CalibrationError(
            f"No bits by layer keep {what} within {tolerance:g}: at {most:.2f} bits, the most that layers can "
            f"have, about {ratio * menu.choose(most).predicted:.2g} are predicted. Allow more."
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
