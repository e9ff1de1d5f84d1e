"""Bits by layer: predictions against measured KL, the integer program, and the search for the fewest bits."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq import MixKVQConfig
from mixkvq.calibrate.allocation import allocate
from mixkvq.calibrate.budget import (
    Menu,
    Text,
    check_base,
    key_options,
    measure_menu,
    smallest,
    value_options,
)
from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.calibrate.sensitivity import layer_costs
from mixkvq.calibrate.trials import Trials
from mixkvq.evaluate.fidelity import WARM_UP, appends, fidelity
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


def test_the_recorded_pass_is_the_models_own():
    model, tokens = tiny_model("llama"), torch.randint(3, VOCABULARY, (200,))
    (tape,) = record(model, tokens, 50, appends(200, BASE), torch.Generator().manual_seed(0), samples=3)
    assert tape.layers == (0, 1)
    assert tape.key_gradients.shape == (3, 2, 2, 200, 16)
    assert tape.scored == 150
    # The last block is read by nobody later, and everything before it is.
    last = appends(200, BASE)[-1][0]
    assert tape.key_gradients[:, :, :, last:].abs().max() == 0
    assert (tape.value_gradients[:, :, :, :last].abs().amax((0, 2, 4)) > 0).all()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_predictions_are_near_the_measured_kl(architecture: str):
    """Each layer alone, everything else exact: the mean over windows, within a factor of two."""
    model = tiny_model(architecture)
    texts = torch.randint(3, VOCABULARY, (6, 400))
    own, exact = {"policy": "kivi", "key_bits": 4, "value_bits": 4}, {"policy": "bf16"}
    base = MixKVQConfig.preset("bf16", residual_length=32, key_group=32)
    layers = quantized_layers(model)
    assert layers == ([1] if architecture == "gemma2" else [0, 1])
    for layer in layers:
        fields = [own if i == layer else exact for i in range(2)]
        measured = fidelity(model, texts, {"one": base.replace(layers=fields)})[0].kl
        predicted = 0.0
        for at, tokens in enumerate(texts):
            generator = torch.Generator().manual_seed(at)
            (tape,) = record(model, tokens, WARM_UP, appends(400, base), generator, samples=4)
            costs = layer_costs(tape, base.replace(**own), appends(400, base))
            row = tape.layers.index(layer)
            predicted += float(costs.keys[row] + costs.values[row]) / len(texts)
        assert 0.5 < predicted / measured < 2, (layer, predicted, measured)


def menu() -> Menu:
    key_bits = [option.get("budget") or option["key_bits"] for option in KEYS]
    value_bits = [option["value_bits"] for option in VALUES]
    return Menu(
        layers=[0, 1],
        key_options=KEYS,
        value_options=VALUES,
        keys=[[8.0 / 4**i for i in range(len(KEYS))], [2.0 / 4**i for i in range(len(KEYS))]],
        values=[[1.0 / 4**i for i in range(len(VALUES))]] * 2,
        key_bits=[bits + 0.25 for bits in key_bits],
        value_bits=[bits + 0.25 for bits in value_bits],
    )


def test_sensitive_layers_get_more():
    choice = menu().choose(2.75)
    assert choice.layers[0]["budget"] > choice.layers[1]["budget"]
    assert choice.bits <= 2.75
    assert choice.predicted == pytest.approx(
        sum(
            menu().keys[i][KEYS.index({"budget": own["budget"]})]
            + menu().values[i][VALUES.index({"value_bits": own["value_bits"]})]
            for i, own in choice.layers.items()
        )
    )
    with pytest.raises(
        CalibrationError, match=r"2.3 bits are below the floor of 2.38: keys of 2.25 code bits take 2.5"
    ):
        menu().choose(2.3)


def test_layers_whose_keys_are_kept_exact():
    exact = dataclasses.replace(menu(), exact=(1,))
    choice = exact.choose(4.4)
    assert choice.layers[1].items() >= KEYS[-1].items()
    assert choice.layers[0].keys() == {"budget", "value_bits"}
    assert choice.bits <= 4.4
    assert exact.floor == ((2.5 + 8.25) / 2 + 2.25) / 2
    with pytest.raises(CalibrationError, match=r"3.7 bits are below the floor of 3.81: .*; keys of exact layers 8.25"):
        exact.choose(3.7)
    with pytest.raises(CalibrationError, match="Layer 7 is none of those whose keys are quantized"):
        dataclasses.replace(menu(), exact=(7,))


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7])
def test_the_fewest_bits_within_a_tolerance(ratio: float):
    measured = []

    def kl_of(choice):
        measured.append(choice.bits)
        return ratio * choice.predicted

    choice, kl = smallest(menu(), 1.0, kl_of)
    assert kl <= 1.0
    assert ratio * menu().choose(choice.bits - 0.1).predicted > 1.0
    assert len(measured) <= 6


def test_nothing_may_be_lost_and_nothing_is():
    choice, loss = smallest(menu(), 0.0, lambda _: -1.0, "the lost points")
    assert loss == -1
    assert choice.bits < menu().floor + 0.2


def test_a_tolerance_that_nothing_keeps():
    with pytest.raises(CalibrationError, match=r"No bits by layer keep the KL within 1e-09: at 8.25 bits"):
        smallest(menu(), 1e-9, lambda choice: choice.predicted)


def test_measurements_are_taken_up_again(tmp_path: Path):
    model, journal = tiny_model("llama"), tmp_path / "trials"
    texts = [Text(f"{i}", torch.randint(3, VOCABULARY, (150,)), appends(150, BASE), 40) for i in range(2)]
    steps: list[str] = []

    def interrupt(what: str) -> None:
        steps.append(what)
        if len(steps) == len(KEYS) + 2:  # in the second text
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_menu(model, BASE, texts, Trials(journal, {"seed": 0}), advance=interrupt)
    steps.clear()
    found = measure_menu(model, BASE, texts, Trials(journal, {"seed": 0}), advance=steps.append)
    assert steps == ["gradients", *(f"option {i + 1} of {len(KEYS)}" for i in range(len(KEYS)))]
    assert found == measure_menu(model, BASE, texts, Trials(None, {"seed": 0}))
    assert all(costs[0] > costs[-1] > 0 for costs in [*found.keys, *found.values])
    with pytest.raises(CalibrationError, match=r"holds trials of other settings \(seed\)"):
        Trials(journal, {"seed": 1})
    choice = found.choose(found.floor + 0.5)
    row = fidelity(model, texts[0].tokens[None].repeat(1, 2), {"found": choice.config(BASE, model)})[0]
    assert row.bits == pytest.approx(choice.bits)


def test_caches_without_a_budget_have_no_bits_by_layer():
    for base in (MixKVQConfig.preset("kivi-2"), BASE.replace(layers=[{}])):
        with pytest.raises(CalibrationError, match="a cache with a budget of key channels"):
            check_base(base)


def test_a_model_without_gradients(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model.model.norm), "forward", lambda _, x: x.detach())
    with pytest.raises(CalibrationError, match="none come through the model"):
        record(model, torch.randint(3, VOCABULARY, (100,)), 50, appends(100, BASE), torch.Generator())
