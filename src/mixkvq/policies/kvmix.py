"""KVmix (AAAI 2026, arXiv 2506.08018): layers whose projections have the largest gradients get more bits."""

from __future__ import annotations

from mixkvq.config import Preset
from mixkvq.policies.kivi import KIVI

SOURCE = "KVmix, arXiv 2506.08018"
#: Fields of layers that a profile ranks among the first, for keys and for values.
WIDE_KEYS = {"key_bits": 3}
WIDE_VALUES = {"value_bits": 4}
#: Share of the layers that are.
WIDE_SHARE = 0.2


class KVmix(KIVI):
    """Every channel of a layer has the layer's ``key_bits``, which a profile of the model sets (``calibrate kvmix``).

    Keys per channel along tokens, values per token along channels, groups of 32. Differs from the paper in one point:
    the newest tokens in full precision are a block of up to R, not a share of the context.
    """

    name = "kvmix"
    presets = {  # noqa: RUF012
        "kvmix": Preset(
            "2 bits for all layers until `mixkvq calibrate kvmix` has found which need 3 and 4",
            SOURCE,
            {"policy": "kvmix"},
        ),
    }


def allocate_layers(key_norms: dict[int, float], value_norms: dict[int, float]) -> dict[int, dict[str, int]]:
    """What layers get by their gradients' norms: the top fifth of each ranking is wide, ties to the earlier layer.

    Section 3.2 of the paper; 6 of 32 layers.
    """
    fields: dict[int, dict[str, int]] = {layer: {} for layer in key_norms}
    count = round(WIDE_SHARE * len(fields))
    for norms, wide in ((key_norms, WIDE_KEYS), (value_norms, WIDE_VALUES)):
        for layer in sorted(norms, key=lambda layer: (-norms[layer], layer))[:count]:
            fields[layer] |= wide
    return fields
