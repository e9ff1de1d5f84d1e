"""Bits by layer: predictions against measured KL, and measurements that are taken up again."""

from pathlib import Path

import pytest
import torch

from mixkvq import MixKVQConfig
from mixkvq.calibrate.budget import Text, check_base, measure_menu
from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.calibrate.menu import Sizes, key_options
from mixkvq.calibrate.sensitivity import layer_costs
from mixkvq.calibrate.trials import Trials
from mixkvq.evaluate.fidelity import WARM_UP, appends, fidelity
from models import VOCABULARY, tiny_model

BASE = MixKVQConfig.preset("default", residual_length=32, key_group=32)
KEYS = key_options(BASE)


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


def test_measurements_are_taken_up_again(tmp_path: Path):
    model, journal = tiny_model("llama"), tmp_path / "trials"
    texts = [Text(f"{i}", torch.randint(3, VOCABULARY, (150,)), appends(150, BASE), 40) for i in range(2)]
    sizes = Sizes.of(model, BASE, texts[0].tokens)
    steps: list[str] = []

    def interrupt(what: str) -> None:
        steps.append(what)
        if len(steps) == len(KEYS) + 2:  # in the second text
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_menu(model, BASE, texts, sizes, Trials(journal, {"seed": 0}), advance=interrupt)
    steps.clear()
    found = measure_menu(model, BASE, texts, sizes, Trials(journal, {"seed": 0}), advance=steps.append)
    assert steps == ["gradients", *(f"option {i + 1} of {len(KEYS)}" for i in range(len(KEYS)))]
    assert found == measure_menu(model, BASE, texts, sizes, Trials(None, {"seed": 0}))
    assert all(costs[0] > costs[-1] > 0 for costs in [*found.keys, *found.values])
    with pytest.raises(CalibrationError, match=r"holds trials of other settings \(seed\)"):
        Trials(journal, {"seed": 1})
    choice = found.choose(sizes.floor + 0.5)
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
