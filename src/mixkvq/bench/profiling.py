"""Where a graph's time goes, by the names of its kernels."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

#: Modules of :mod:`mixkvq.kernels.triton` that serve flushes: their kernels are known by these beginnings.
FLUSH_MODULES = ("advance", "feedback", "pack", "plan")
#: Kernels of :mod:`mixkvq.kernels.cuda` that do.
CUDA_FLUSH_KERNELS = ("move_keys",)


def flush_share(run: Callable[[], object], repeats: int) -> float | None:
    """Share of the GPU's time that choosing widths, quantizing and packing take in ``repeats`` runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    names = flush_kernels()
    flushes = total = 0.0
    for event in profiler.key_averages():
        total += event.self_device_time_total
        if event.key in names:
            flushes += event.self_device_time_total
    return flushes / total if total else None


def flush_kernels() -> set[str]:
    """Names of the kernels that serve flushes."""
    from triton.runtime.jit import KernelInterface

    from mixkvq.kernels import triton as kernels

    names = set(CUDA_FLUSH_KERNELS)
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name.startswith(FLUSH_MODULES):
            members = vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).values()
            names |= {member.fn.__name__ for member in members if isinstance(member, KernelInterface)}
    return names
