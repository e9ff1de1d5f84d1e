"""A sliding window (StreamingLLM, arXiv 2309.17453): the first tokens and the newest, in the model's own type."""

from __future__ import annotations

from torch import Tensor

from mixkvq.config import Preset
from mixkvq.policies.evicting import EvictingPolicy
from mixkvq.quant.block import DENSE_BITS

SOURCE = "StreamingLLM, arXiv 2309.17453"


class Window(EvictingPolicy):
    """Keeps the first ``sinks`` tokens and the newest, ``keep`` together.

    Differs from the paper in one point: keys keep the positions that they were stored with, where StreamingLLM counts
    anew within the cache, so texts are not to be longer than the model's context.
    """

    name = "window"
    presets = {  # noqa: RUF012
        "window-512": Preset(
            "the first 4 tokens and the newest 508, not quantized; all others are evicted",
            SOURCE,
            {"policy": "window", "keep": 512, "sinks": 4, "key_bits": DENSE_BITS, "value_bits": DENSE_BITS},
        ),
    }

    def rank(self, steps: Tensor, mass: Tensor | None, free: Tensor) -> Tensor:
        return steps.float()
