"""KVQuant's levels: what is counted, how it weighs, and that the model is better for them."""

import pytest
import torch

from mixkvq import ConfigError, MixKVQConfig
from mixkvq.calibrate.capture import Tape
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.kvquant import check_base, count_layer, layer_levels
from mixkvq.calibrate.layers import with_layers
from mixkvq.evaluate.fidelity import appends, fidelity
from mixkvq.quant.levels import BINS_PER_STEP, new_histogram
from mixkvq.quant.rope import Rope
from models import VOCABULARY, tiny_model

SMALL = MixKVQConfig.parse("kvquant-2:residual_length=16,key_group=16,sinks=1,outliers=0")


def tape(keys: torch.Tensor, values: torch.Tensor, key_gradients: torch.Tensor, value_gradients: torch.Tensor) -> Tape:
    """A recording of one layer with one head; tensors are ``[T, D]``."""
    x = [each[None, None] for each in (keys, values, key_gradients, value_gradients)]
    return Tape((0,), x[0], x[0], x[1], x[2][None], x[3][None], scored=1, attention=({},))


def counted(histogram: torch.Tensor) -> dict[int, float]:
    return {at: histogram[at].item() for at in histogram.nonzero().flatten().tolist()}


def test_what_is_counted_by_hand():
    # A sink, a block, and a token that is in no block. The channel goes from 0 to 6: a step is 2, and 3 lies at 1.5.
    channel = torch.tensor([100.0, *[0.0] * 14, 3.0, 6.0, 50.0])
    gradient = torch.zeros(18)
    gradient[15], gradient[16], gradient[0], gradient[17] = 0.5, 1.0, 9.0, 9.0
    # The values of a token are 1 and 4: a step is 1, and 4 lies at 3.
    values = torch.tensor([1.0, 4.0]).expand(18, 2)
    value_gradients = torch.zeros(18, 2)
    value_gradients[3, 1] = 2.0
    keys, key_gradients = (x[:, None].expand(18, 2) for x in (channel, gradient))
    histograms = new_histogram(2), new_histogram(2)
    count_layer(tape(keys, values, key_gradients, value_gradients), 0, SMALL, histograms)
    last = 3 * BINS_PER_STEP - 1
    # squared gradient times squared step, of two equal channels
    assert counted(histograms[0]) == {BINS_PER_STEP * 3 // 2: 2 * 0.25 * 4, last: 2 * 1.0 * 4}
    assert counted(histograms[1]) == {last: 4.0}


def test_keys_and_their_gradients_are_counted_before_rope():
    keys, values, key_gradients, value_gradients = torch.randn(4, 18, 4)
    plain, turned = ((new_histogram(2), new_histogram(2)) for _ in range(2))
    count_layer(tape(keys, values, key_gradients, value_gradients), 0, SMALL, plain)
    rope = Rope.of_base(4)
    with_rope = [rope.apply(x[None, None], torch.zeros(1))[0, 0] for x in (keys, key_gradients)]
    count_layer(tape(with_rope[0], values, with_rope[1], value_gradients), 0, SMALL, turned, rope)
    assert torch.equal(turned[1], plain[1])
    mass = plain[0].sum()
    assert turned[0].sum() == pytest.approx(float(mass), rel=1e-2)
    assert (turned[0] - plain[0]).cumsum(0).abs().sum() < mass  # moved by less than a bin, by rounding


def test_outliers_are_not_counted():
    keys = torch.randn(17, 4)
    keys[5, 2] = 1000.0
    gradients = torch.zeros(17, 4)
    gradients[5, 2] = 1.0
    histograms = new_histogram(2), new_histogram(2)
    with_outliers = SMALL.replace(outliers=0.02)  # one of 64
    count_layer(tape(keys, keys, gradients, gradients), 0, with_outliers, histograms)
    assert not histograms[0].any()


def test_a_text_without_a_block_counts_nothing():
    x = torch.ones(9, 2)
    histograms = new_histogram(2), new_histogram(2)
    count_layer(tape(x, x, x, x), 0, SMALL, histograms)
    assert not histograms[0].any()


def test_fitted_levels_cost_no_bits_and_less_quality():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 500))
    base = MixKVQConfig.preset("kvquant-2")
    generator = torch.Generator().manual_seed(0)
    fields = layer_levels(model, texts[:1], base, appends(500, base), 128, generator)
    assert fields.keys() == {0, 1}
    fitted = with_layers(base, fields, model)
    uniform, found = fidelity(model, texts[1:], {"uniform": base, "found": fitted})
    assert (uniform.cache, found.cache) == ("uniform", "found")
    assert found.bits == uniform.bits
    assert found.kl < uniform.kl


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("bf16", CalibrationError, "this cache leaves keys or values as they are"),
        ("default", ConfigError, "key_levels are made for the whole range of a group"),
        ("rotatekv-4:key_clip=false,value_clip=false", CalibrationError, "set both rotations to none"),
    ],
)
def test_caches_that_have_no_levels(text: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        check_base(MixKVQConfig.parse(text))


def test_caches_with_settings_by_layer():
    with pytest.raises(CalibrationError, match="start from a preset"):
        check_base(MixKVQConfig.preset("kvquant-2", layers=[{}, {}]))
