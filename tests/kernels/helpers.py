"""A cache's content as device kernels read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from mixkvq.layers import LayerCache
from mixkvq.store.tensors import CacheTensors


def cache_tensors(cache: LayerCache) -> CacheTensors:
    """Copies of the books, the store's own tensors, and garbage wherever a kernel must not look.

    There are ``sinks + R + 8`` dense slots; those that are not filled hold NaN.
    """
    store = cache.store
    device = store.device
    table = torch.full((store.batch, max(map(len, store.tables))), 1 << 30, dtype=torch.int32)
    for row, pages in enumerate(store.tables):
        table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    dense = []
    for tokens in (store.dense_keys, store.dense_values):
        slots = tokens.new_full((*tokens.shape[:2], store.sinks + store.layout.tokens + 8, tokens.shape[3]), torch.nan)
        for row in range(store.batch):
            filled = store._filled(row)
            slots[row, :, :filled] = tokens[row, :, :filled]
        dense.append(slots)
    return CacheTensors(
        layout=store.layout,
        sinks=store.sinks,
        rotated=cache.rotated,
        pages=store.pages.data,
        chunks={bits: pool.data for bits, pool in store.chunks.items()},
        table=table.to(device),
        lengths=torch.tensor(store.lengths, dtype=torch.int32, device=device),
        dense_keys=dense[0],
        dense_values=dense[1],
    )


def current_devices(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, kernel: str, launch: Callable[[], object]
) -> list[torch.device | None]:
    """The device that is made current for each launch of a Triton kernel by ``launch``; None where none is.

    Of a model's layers on several GPUs, most lie on one that is not current by itself.
    """
    current: list[torch.device] = []
    found: list[torch.device | None] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **options: found.append(current[-1] if current else None)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", device_of)
        patch.setattr(module, kernel, Kernel())
        launch()
    return found
