"""Options of layers: sizes, the integer program, and the search for the fewest bits."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq import MixKVQConfig
from mixkvq.calibrate.allocation import allocate
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.menu import Menu, Sizes, key_options, smallest, value_options
from mixkvq.evaluate.fidelity import fidelity
from models import VOCABULARY, tiny_model

BASE = MixKVQConfig.preset("default", residual_length=32, key_group=32)
KEYS, VALUES = key_options(BASE), value_options()


def test_options_leave_out_what_is_of_the_policy_that_they_replace():
    for base in (BASE, MixKVQConfig.preset("kitty"), MixKVQConfig.preset("default", salience="error")):
        for option in key_options(base):
            assert base.replace(**option).key_group in (base.key_group, 64)
    assert key_options(BASE)[-1] == {"policy": "kivi", "budget": None, "key_bits": 8}


def test_the_integer_program_by_hand():
    # Two parts, three options each: 4 units are spent where they save most.
    costs, sizes = [[9, 5, 1], [4, 3, 2]], [[1, 2, 3], [1, 2, 3]]
    assert allocate(costs, sizes, 4) == [2, 0]
    assert allocate(costs, sizes, 6) == [2, 2]
    assert allocate(costs, sizes, 2) == [0, 0]
    with pytest.raises(CalibrationError, match=r"A budget of 1.5 is below the floor: the smallest options take 2"):
        allocate(costs, sizes, 1.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), min_size=1, max_size=4), st.floats(0, 1))
def test_no_choice_within_the_budget_is_better(costs: list[list[float]], share: float):
    sizes = [[1.0, 2.0, 4.0]] * len(costs)
    budget = len(costs) * (1 + 3 * share)
    found = allocate(costs, sizes, budget)
    assert sum(part[i] for part, i in zip(sizes, found, strict=True)) <= budget + 1e-6
    cost = sum(part[i] for part, i in zip(costs, found, strict=True))
    for other in itertools.product(range(3), repeat=len(costs)):
        if sum(part[i] for part, i in zip(sizes, other, strict=True)) <= budget:
            assert cost <= sum(part[i] for part, i in zip(costs, other, strict=True)) * (1 + 1e-3) + 1e-6


SIZES = Sizes(
    layers=[0, 1],
    key_options=KEYS,
    value_options=VALUES,
    key_bits=[(option.get("budget") or option["key_bits"]) + 0.25 for option in KEYS],
    value_bits=[option["value_bits"] + 0.25 for option in VALUES],
)
MENU = Menu(
    SIZES,
    keys=[[8.0 / 4**i for i in range(len(KEYS))], [2.0 / 4**i for i in range(len(KEYS))]],
    values=[[1.0 / 4**i for i in range(len(VALUES))]] * 2,
)


def test_sensitive_layers_get_more():
    choice = MENU.choose(2.75)
    assert choice.layers[0]["budget"] > choice.layers[1]["budget"]
    assert choice.bits <= 2.75
    assert choice.predicted == pytest.approx(
        sum(
            MENU.keys[i][KEYS.index({"budget": own["budget"]})]
            + MENU.values[i][VALUES.index({"value_bits": own["value_bits"]})]
            for i, own in choice.layers.items()
        )
    )
    with pytest.raises(
        CalibrationError, match=r"2.3 bits are below the floor of 2.38: keys of 2.25 code bits take 2.5"
    ):
        MENU.choose(2.3)


def test_layers_whose_keys_are_kept_exact():
    exact = dataclasses.replace(MENU, sizes=dataclasses.replace(SIZES, exact=(1,)))
    choice = exact.choose(4.4)
    assert choice.layers[1].items() >= KEYS[-1].items()
    assert choice.layers[0].keys() == {"budget", "value_bits"}
    assert choice.bits <= 4.4
    assert exact.sizes.floor == ((2.5 + 8.25) / 2 + 2.25) / 2
    with pytest.raises(CalibrationError, match=r"3.7 bits are below the floor of 3.81: .*; keys of exact layers 8.25"):
        exact.choose(3.7)
    with pytest.raises(CalibrationError, match="Layer 7 is none of those whose keys are quantized"):
        dataclasses.replace(SIZES, exact=(7,))


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7])
def test_the_fewest_bits_within_a_tolerance(ratio: float):
    measured = []

    def kl_of(choice):
        measured.append(choice.bits)
        return ratio * choice.predicted

    choice, kl = smallest(MENU, 1.0, kl_of)
    assert kl <= 1.0
    assert ratio * MENU.choose(choice.bits - 0.1).predicted > 1.0
    assert len(measured) <= 6


def test_nothing_may_be_lost_and_nothing_is():
    choice, loss = smallest(MENU, 0.0, lambda _: -1.0, "the lost points")
    assert loss == -1
    assert choice.bits < SIZES.floor + 0.2


def test_a_tolerance_that_nothing_keeps():
    with pytest.raises(CalibrationError, match=r"No bits by layer keep the KL within 1e-09: at 8.25 bits"):
        smallest(MENU, 1e-9, lambda choice: choice.predicted)


def test_sizes_are_those_of_the_real_cache():
    model, tokens = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 300))
    sizes = Sizes.of(model, BASE, tokens[0], exact=[1])
    for at, (option, bits) in enumerate(zip(KEYS, sizes.key_bits, strict=True)):
        fields = {**option, **VALUES[min(at, 3)]}
        row = fidelity(model, tokens, {"": BASE.replace(**fields)})[0]
        assert row.key_bits == bits
        assert row.value_bits == sizes.value_bits[min(at, 3)]
    assert sizes.exact == (1,)
    with pytest.raises(CalibrationError, match="Layer 2 is none of those whose keys are quantized: 0, 1"):
        Sizes.of(model, BASE, tokens[0], exact=[2])


@pytest.mark.parametrize("bits", [2.3, float("nan"), -1])
def test_bits_that_no_options_come_to(bits: float):
    with pytest.raises(CalibrationError, match=r"bits are below the floor of 2.38"):
        SIZES.check(bits)


def test_more_bits_than_there_are_come_to_the_largest_options():
    assert MENU.choose(float("inf")).bits == SIZES.ceiling == 8.25
