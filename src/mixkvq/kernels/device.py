"""What a launch has to know of the device."""

from __future__ import annotations

from functools import lru_cache

import torch

#: Multiprocessors that a CPU counts, where kernels are interpreted: small contexts are to be split there, too.
INTERPRETED = 2


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED
