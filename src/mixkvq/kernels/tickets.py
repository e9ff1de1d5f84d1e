"""Counters by which the programs of a launch find out who is last."""

from __future__ import annotations

import torch
from torch import Tensor

#: Counters that are made at least.
COUNT = 1 << 16

#: By device and number. CUDA graphs hold their addresses: none is ever given up.
_TICKETS: dict[tuple[torch.device, int], Tensor] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 counters, which are 0 between launches: whoever raises one sets it back.

    Launches that share a device's counters must be ordered, as those of one stream or one CUDA graph are.

    Raises:
        RuntimeError: they do not exist yet, and a CUDA graph is being captured, in whose memory they must not lie.
    """
    key = (device, max(COUNT, 1 << (count - 1).bit_length()))
    if key not in _TICKETS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"There are no {key[1]} counters on {device} yet, and a CUDA graph under capture cannot make them: "
                "run the same call once before."
            )
        with torch.inference_mode(False):
            _TICKETS[key] = torch.zeros(key[1], dtype=torch.int32, device=device)
    return _TICKETS[key]
