"""RotateKV (IJCAI 2025, arXiv 2501.16383): keys and values are Hadamard-rotated and quantized per token."""

from __future__ import annotations

from typing import Any

from mixkvq.config import ConfigError, MixKVQConfig, Preset
from mixkvq.policies.kivi import KIVI

SOURCE = "RotateKV, arXiv 2501.16383"
#: Keys and values are treated alike.
FIELDS: dict[str, Any] = {
    "policy": "rotatekv",
    "sinks": 20,
    "key_axis": "token",
    "key_group": 128,
    "key_rotation": "hadamard",
    "key_rope": "before",
    "key_clip": True,
    "value_group": 128,
    "value_rotation": "hadamard",
    "value_clip": True,
}


class RotateKV(KIVI):
    """Every channel has ``key_bits``; keys and values are rotated head by head, and a token's channels share a scale.

    Differs from the paper: each head is rotated for itself, without the calibrated order of channels; the first 20
    tokens stay in full precision, not those with massive activations (docs/rotatekv.md).
    """

    name = "rotatekv"
    presets = {  # noqa: RUF012
        "rotatekv-2": Preset(
            "rotated keys (before RoPE) and values, 2 bits per token in groups of 128",
            SOURCE,
            FIELDS,
        ),
        "rotatekv-4": Preset("the same in 4 bits", SOURCE, {**FIELDS, "key_bits": 4, "value_bits": 4}),
    }

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        super().check(config)
        if (config.key_axis, config.key_rotation) != ("token", "hadamard"):
            raise ConfigError("The rotatekv policy takes key_axis='token' and key_rotation='hadamard'.")
