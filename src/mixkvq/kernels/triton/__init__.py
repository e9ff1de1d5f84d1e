"""Kernels in Triton: one source for GPUs of every maker that Triton knows, and for its interpreter on a CPU."""

from __future__ import annotations

import importlib.util

import torch


def available(device: torch.device) -> bool:
    """Whether these kernels run on tensors of the given device: a GPU, or any with ``TRITON_INTERPRET=1``."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return device.type == "cuda" or bool(knobs.runtime.interpret)
