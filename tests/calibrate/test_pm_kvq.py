"""PM-KVQ's calibration: sensitivities against the formula, the integer program by hand, stretched positions."""

import pytest
import torch

from mixkvq import MixKVQConfig
from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import packed_memory, with_layers
from mixkvq.calibrate.pm_kvq import FIRST, at_width, last_widths, sensitivities, stretched
from mixkvq.calibrate.trials import Trials
from mixkvq.evaluate.fidelity import appends, fidelity
from mixkvq.quant.block import quantize_keys, quantize_values
from models import VOCABULARY, tiny_model

BASE = MixKVQConfig.preset("pm-kvq-2", residual_length=32, key_group=32, plan_tokens=400)


def test_the_integer_program_by_hand():
    # Four bits for two of three layers: those that lose most at 2.
    found = {0: [1.0, 5.0], 1: [0.5, 9.0], 2: [2.0, 4.0]}
    assert last_widths(found, [4.5, 2.5], (4, 2), 11.5 / 3) == {0: 4, 1: 4, 2: 2}
    assert last_widths(found, [4.5, 2.5], (4, 2), 2.5) == {0: 2, 1: 2, 2: 2}
    with pytest.raises(CalibrationError, match=r"2.4 bits are below the floor of 2.5: 2-bit codes"):
        last_widths(found, [4.5, 2.5], (4, 2), 2.4)


def test_stretched_positions():
    model, tokens = tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 50))
    plain = model(tokens).logits
    with stretched(model, 4):
        found = model(tokens).logits
    wanted = model(tokens, position_ids=4 * torch.arange(50)[None], attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(found, wanted)
    assert torch.equal(model(tokens).logits, plain)
    with pytest.raises(RuntimeError), stretched(model, 4):
        raise RuntimeError
    assert torch.equal(model(tokens).logits, plain)


def test_sensitivities_are_the_sum_of_the_papers():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 385))
    found = sensitivities(model, BASE, texts, (4, 2), Trials(None, {}), stretch=1)
    bits = [packed_memory(model, at_width(BASE, width), texts[0]).bits for width in (4, 2)]
    assert bits == [4 + (32 / 32 + 32 / 16) / 2, 2 + (32 / 32 + 32 / 16) / 2]
    (tape,) = record(model, texts[0], FIRST, appends(385, BASE), None)
    keys, values = tape.keys[1:, :, 1:].unflatten(2, (12, 32)), tape.values[1:, :, 1:].unflatten(2, (12, 32))
    bits_of = torch.full((12, 2, 16), 2, dtype=torch.uint8)
    options = {"clip": False, "unbiased": False, "param_dtype": torch.float16}
    k = quantize_keys(keys[0].transpose(0, 1), bits_of, group=32, **options)
    v = quantize_values(values[0].transpose(0, 1), 2, groups=1, rotation=False, **options)
    wanted = 0.0
    for q, exact, gradients in ((k, tape.keys, tape.key_gradients), (v, tape.values, tape.value_gradients)):
        stored = (q.codes * q.scale + q.zero).transpose(0, 1).flatten(1, 2)
        wanted += float((gradients[0, 1, :, 1:] * (stored - exact[1, :, 1:])).abs().sum())
    assert found[1][1] == pytest.approx(wanted, rel=1e-4)
    assert all(narrow > wide > 0 for wide, narrow in found.values())


def test_a_growing_cache_is_better_than_a_fixed_one_of_its_last_width():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 400))
    base = MixKVQConfig.preset("pm-kvq-4", residual_length=32, key_group=32, plan_tokens=400)
    widths = {0: {"key_bits": 4, "value_bits": 4}, 1: {"key_bits": 2, "value_bits": 2}}
    mixed = with_layers(base, widths, model)
    fixed = mixed.replace(policy="kivi", plan_tokens=None)
    grown, plain = fidelity(model, texts, {"pm-kvq": mixed, "fixed": fixed})
    assert grown.kl < plain.kl
    assert grown.bits == plain.bits  # at the full length
