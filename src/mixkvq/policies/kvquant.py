"""KVQuant (NeurIPS 2024, arXiv 2401.18079): keys per channel, values per token, outliers apart, non-uniform levels."""

from __future__ import annotations

from typing import Any

from mixkvq.config import Preset
from mixkvq.policies.kitty import WHOLE_HEAD
from mixkvq.policies.kivi import KIVI

SOURCE = "KVQuant, arXiv 2401.18079"
FIELDS: dict[str, Any] = {
    "policy": "kvquant",
    "sinks": 1,
    "key_group": 128,
    "key_rope": "before",
    "value_group": WHOLE_HEAD,
    "outliers": 0.01,
}


class KVQuant(KIVI):
    """Every channel has ``key_bits``; 1% of a page's keys and values are kept in 16 bits, and no range reaches to them.

    Differs from the paper: ranges of keys are each block's own, not calibrated, and outliers are as many in every page.
    Levels are uniform until they are calibrated (docs/kvquant.md).
    """

    name = "kvquant"
    presets = {  # noqa: RUF012
        "kvquant-2": Preset(
            "2 bits, keys before RoPE, 1% of outliers kept apart, ranges of each block (the paper's are calibrated); "
            "uniform levels until `mixkvq calibrate kvquant` has found others",
            SOURCE,
            FIELDS,
        ),
        "kvquant-4": Preset("the same in 4 bits", SOURCE, {**FIELDS, "key_bits": 4, "value_bits": 4}),
    }
