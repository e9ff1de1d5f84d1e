"""What this package's own presets have in common, whoever gets which bits: see docs/method.md."""

from __future__ import annotations

from typing import Any

#: Fields of the configuration.
REFINED: dict[str, Any] = {
    "sinks": 4,
    "key_clip": True,
    "key_unbiased": True,
    "key_feedback": 0.4,
    "value_group": 64,
    "value_clip": True,
    "value_unbiased": True,
    "value_symmetric": True,
    "value_rotation": "hadamard",
}
#: Where they come from.
OURS = "this package; see docs/method.md"
