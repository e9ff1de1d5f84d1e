"""KVmix (AAAI 2026, arXiv 2506.08018): layers whose projections have the largest gradients get more bits."""

from __future__ import annotations

from mixkvq.config import Preset
from mixkvq.policies.base import PlanRule
from mixkvq.policies.kivi import KIVI

SOURCE = "KVmix, arXiv 2506.08018"
#: Fields of layers that a profile ranks among the first, for keys and for values.
WIDE_KEYS = {"key_bits": 3}
WIDE_VALUES = {"value_bits": 4}
#: Share of the layers that are.
WIDE_SHARE = 0.2
#: Width of the other layers.
NARROW_BITS = 2
#: Share of the context that a layer of that width keeps as it is; wide ones keep twice as much.
RECENT = 0.1


class KVmix(KIVI):
    """Every channel of a layer has the layer's ``key_bits``, which a profile of the model sets (``calibrate kvmix``).

    Keys per channel along tokens, values per token along channels, groups of 32. The newest tokens ("recent pivotal
    context") stay in the model's type: at least a share of the context, and less than R tokens more than that.
    """

    name = "kvmix"
    fields = frozenset({"recent", "recent_of"})
    presets = {  # noqa: RUF012
        "kvmix": Preset(
            "2 bits until `mixkvq calibrate kvmix` has found which layers need 3 and 4; the newest tenth in 16",
            SOURCE,
            {"policy": "kvmix", "recent": RECENT},
        ),
    }

    @property
    def recent(self) -> float:
        config = self.config
        wide = max(config.key_bits, config.value_bits) > NARROW_BITS
        return 2 * config.recent if wide else config.recent

    @property
    def rule(self) -> PlanRule | None:
        """None with a share of the context: where a token lies does not follow from its number then."""
        return None if self.recent else super().rule


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
