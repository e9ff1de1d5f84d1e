"""Thresholds from quantiles: small examples by hand, and the promoted shares on a model."""

import pytest
import torch

from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.thresholds import at_shares, largest_shares, measured_saliences, uint4_share_for
from mixkvq.evaluate.fidelity import fidelity
from models import VOCABULARY, tiny_model


def test_quantiles_by_hand():
    ranked = torch.arange(10, 0, -1.0)  # 10, 9, ..., 1
    found = at_shares(ranked, bf16_share=0.1, uint4_share=0.3)
    assert found.tau_bf16 == 9.0  # only 10 lies above
    assert found.tau_uint4 == 6.0  # 9, 8 and 7 lie above, and not above the other
    assert found.bits == pytest.approx(2 + 0.3 * 2 + 0.1 * 14)
    assert at_shares(ranked, 0, 0).tau_bf16 == at_shares(ranked, 0, 0).tau_uint4 == 10.0
    assert at_shares(ranked, 0.5, 0.9).tau_uint4 == 1.0


def test_shares_and_the_bits_that_they_spend():
    assert uint4_share_for(2.3, 0.01) == pytest.approx(0.08)
    largest = largest_shares(2.3)
    assert largest == pytest.approx({"bf16_share": 0.3 / 14, "uint4_share": 0.15})
    assert largest_shares(6) == {"bf16_share": 4 / 14, "uint4_share": 1}
    for bits, share, message in (
        (2.1, 0.02, "Choose bits between 2.28 and 4.24"),
        (2.1, -0.1, "the share is at least 0 and below 1"),
    ):
        with pytest.raises(CalibrationError, match=message):
            uint4_share_for(bits, share)
    with pytest.raises(CalibrationError, match="2 bits: channels have 2 to 16"):
        largest_shares(2)


def test_thresholds_promote_the_shares():
    model, windows = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 600))
    ranked = measured_saliences(model, windows)
    assert len(ranked) == 2 * 4 * 2 * 32  # windows, blocks, layers, channels
    found = at_shares(ranked, 0.05, 0.25)
    row = fidelity(model, windows, {"found": found.config(model)})[0]
    assert row.key_bits_codes == pytest.approx(found.bits, abs=0.1)
    with pytest.raises(CalibrationError, match="Windows of 100 tokens do not hold a block of 128"):
        measured_saliences(model, windows[:, :100])
