"""The real model: what the README claims holds in direction on text that this repository makes itself."""

import pytest
import torch

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.calibrate.file import read_about, shipped
from mixkvq.calibrate.fingerprint import of_weights
from mixkvq.evaluate.fidelity import fidelity
from mixkvq.evaluate.texts import windows
from mixkvq.generation import generate_text
from mixkvq.models import ModelError, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load(dtype=torch.float32)
    except ModelError as error:
        pytest.skip(str(error))


def test_the_order_of_the_fidelity_table(smollm2):
    model, tokenizer = smollm2
    text = windows(tokenizer, [None], 1024, 1)
    calibrated = "default-smollm2-135m.json"
    configs = {name: MixKVQConfig.parse(name) for name in ("kivi-2", "paper", "default", calibrated, "kivi-4")}
    rows = {row.cache: row for row in fidelity(model, text, configs)}
    assert rows["default"].bits <= 2.75
    assert rows["default"].kl < 0.42 * rows["paper"].kl
    assert rows["paper"].kl < 0.4 * rows["kivi-2"].kl
    assert rows["kivi-4"].kl < 0.02
    assert rows["kivi-2"].bits == 3.0
    assert rows[calibrated].kl < rows["default"].kl
    assert rows[calibrated].bits <= rows["default"].bits


def test_a_long_cache_is_a_fifth_of_bf16(smollm2):
    model, tokenizer = smollm2
    model.to(torch.bfloat16)
    try:
        cache = MixKVQCache(model.config, "default")
        tokens = windows(tokenizer, [None], 8192, 1)
        with torch.inference_mode():
            model(tokens, past_key_values=cache, logits_to_keep=1)
        assert cache.memory().bf16 == 8192 * 30 * 3 * 64 * 2 * 2
        assert cache.memory().total <= cache.memory().bf16 / 5
    finally:
        model.to(torch.float32)


def test_greedy_text_of_the_bf16_cache_is_the_stock_text(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer("The three laws of thermodynamics are")["input_ids"]])
    stock = generate_text(model, tokenizer, ids, None, max_new_tokens=150)
    ours = generate_text(model, tokenizer, ids, MixKVQCache(model.config, "bf16"), max_new_tokens=150)
    assert ours.tokens == stock.tokens


def test_calibrations_that_come_with_the_package_are_of_these_weights(smollm2):
    model, _ = smollm2
    assert len(shipped()) == 10
    assert {read_about(name)["weights"] for name in shipped()} == {of_weights(model)}
