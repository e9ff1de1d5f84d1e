"""KVTuner (ICML 2025, arXiv 2502.04420): every layer has a pair of widths, one for keys and one for values."""

from __future__ import annotations

from mixkvq.config import Preset
from mixkvq.policies.kivi import KIVI

SOURCE = "KVTuner, arXiv 2502.04420"
#: Widths of keys and values that a layer can have, by falling size.
PAIRS = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))


def pair_fields(pair: tuple[int, int]) -> dict[str, int]:
    """Fields of a layer with these widths of keys and values."""
    return {"key_bits": pair[0], "value_bits": pair[1]}


class KVTuner(KIVI):
    """Every channel of a layer has the layer's ``key_bits``, which a search sets (``calibrate kvtuner``).

    Keys per channel along tokens, values per token along channels, groups of 32: the paper's KIVI mode.
    """

    name = "kvtuner"
    presets = {  # noqa: RUF012
        "kvtuner": Preset(
            "4 bits for all layers until `mixkvq calibrate kvtuner` has found each layer's pair",
            SOURCE,
            {"policy": "kvtuner", **pair_fields((4, 4))},
        ),
    }
