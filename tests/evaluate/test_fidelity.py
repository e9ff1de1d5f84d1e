"""Fidelity: the appends, the sums, and that appending equals decoding token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.evaluate.fidelity import WARM_UP, appends, fidelity
from mixkvq.models import attention
from mixkvq.report.tables import fidelity_table
from models import VOCABULARY, tiny_model


def test_appends_end_where_blocks_do():
    assert appends(400, MixKVQConfig.preset("kivi-2")) == [(0, 128), (128, 256), (256, 384), (384, 400)]
    assert appends(300, MixKVQConfig.preset("default")) == [(0, 132), (132, 260), (260, 300)]


def test_the_row_says_what_the_logits_say():
    model, config = tiny_model("llama"), MixKVQConfig.preset("kivi-2")
    window = torch.randint(3, VOCABULARY, (1, 384))
    row = fidelity(model, window, {"k": config})[0]
    with torch.inference_mode():
        with attention(model, "eager"):
            exact = model(window).logits[0].log_softmax(-1)
        with attention(model, "mixkvq"):
            cache = MixKVQCache(model.config, config)
            logits = torch.cat([model(part, past_key_values=cache).logits[0] for part in window.split(128, 1)])
    cached = logits.log_softmax(-1)
    scored, targets = slice(WARM_UP, 383), window[0, WARM_UP + 1 :]
    assert row.tokens == 383 - WARM_UP
    assert row.perplexity == pytest.approx(math.exp(F.nll_loss(cached[scored], targets)), rel=1e-4)
    assert row.reference_perplexity == pytest.approx(math.exp(F.nll_loss(exact[scored], targets)), rel=1e-4)
    kl = (exact.exp() * (exact - cached)).sum(-1)[scored].mean().item()
    assert row.kl == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-4
    agreement = (exact.argmax(-1) == cached.argmax(-1))[scored].float().mean().item()
    assert row.top1_agreement == pytest.approx(agreement)
    assert row.bytes_held == cache.memory().total
    assert (row.key_bits_codes, row.key_bits, row.value_bits_codes) == (2.0, 3.0, 2.0)


def test_appending_blocks_equals_decoding_token_by_token():
    model = tiny_model("llama")
    tokens = torch.randint(3, VOCABULARY, (1, 330))
    for name in ("default", "paper:tau_uint4=0.5,tau_bf16=1.2", "kivi-2"):
        config = MixKVQConfig.parse(name)
        blocks, single = MixKVQCache(model.config, config), MixKVQCache(model.config, config)
        with torch.inference_mode(), attention(model, "mixkvq"):
            whole = [model(tokens[:, a:b], past_key_values=blocks).logits for a, b in appends(330, config)]
            steps = [model(tokens[:, i : i + 1], past_key_values=single).logits for i in range(330)]
        # Products of other shapes round differently, and a few codes fall on the other side: near, not equal.
        assert (torch.cat(whole, 1) - torch.cat(steps, 1)).abs().mean() < 1e-3


def test_rows_rise_by_honest_bits_and_bf16_is_exact():
    rows = fidelity(
        tiny_model("llama"),
        torch.randint(3, VOCABULARY, (2, 300)),
        {name: MixKVQConfig.preset(name) for name in ("bf16", "kivi-4", "kivi-2")},
    )
    assert [row.cache for row in rows] == ["kivi-2", "kivi-4", "bf16"]
    assert rows[-1].kl == pytest.approx(0, abs=1e-6)
    assert rows[-1].top1_agreement == 1.0
    assert rows[0].kl > rows[1].kl > 1e-6


def test_bits_of_everything_held_are_marked():
    names = ("kivi-2", "kivi-2:residual_length=512", "kvmix", "window-512")  # 300 tokens fill no block of 512
    caches = {name: MixKVQConfig.parse(name) for name in names}
    rows = fidelity(tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 300)), caches)
    (cells,) = [column.cells for column in fidelity_table(rows).columns if column.header == "bits"]
    bits = {row.cache: cell for row, cell in zip(rows, cells, strict=True)}
    assert {name for name, cell in bits.items() if cell.endswith("*")} == {*names} - {"kivi-2"}
