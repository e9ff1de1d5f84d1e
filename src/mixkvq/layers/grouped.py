"""Layers with settings of their own, in tensors of a fixed size: one :class:`ModelCache` for all that have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mixkvq.config import MixKVQConfig
from mixkvq.layers.static import ModelCache
from mixkvq.layers.step import Step
from mixkvq.layers.turns import Turns
from mixkvq.policies import Policy
from mixkvq.quant.rope import Rope
from mixkvq.store import MemoryReport
from mixkvq.store.shape import Capacity
from mixkvq.store.static import StaticStore

#: A layer's configuration, its policy, and with ``key_rope="before"`` its RoPE. Layers with equal ones share tensors.
LayerSettings = tuple[MixKVQConfig, Policy, Rope | None]


def new_model_cache(settings: Sequence[LayerSettings], capacity: Capacity) -> ModelCache | GroupedCache:
    """The cache of layers with the given settings, in their order."""
    if len(set(settings)) == 1:
        config, policy, rope = settings[0]
        return ModelCache(config, policy, len(settings), capacity, rope)
    if capacity.max_bytes is not None:
        raise ValueError("Layers of this configuration differ in their settings: give the cache max_tokens.")
    return GroupedCache(settings, capacity)


class GroupedCache:
    """Several :class:`ModelCache` behind the interface of one, which see.

    Each quantizes the blocks of its own layers after the last of them. All hold the same tokens.
    """

    def __init__(self, settings: Sequence[LayerSettings], capacity: Capacity) -> None:
        numbers: dict[LayerSettings, list[int]] = {}
        for layer, own in enumerate(settings):
            numbers.setdefault(own, []).append(layer)
        self.groups = [
            ModelCache(config, policy, len(layers), capacity, rope)
            for (config, policy, rope), layers in numbers.items()
        ]
        places = {
            layer: (group, at)
            for group, layers in zip(self.groups, numbers.values(), strict=True)
            for at, layer in enumerate(layers)
        }
        self._places = [places[layer] for layer in range(len(settings))]
        self.capacity, self.layers = capacity, len(settings)
        self._turns = Turns(self.layers)

    @property
    def config(self) -> MixKVQConfig:
        """One layer's, for what all of them have in common."""
        return self.groups[0].config

    @property
    def ready(self) -> bool:
        """Whether all layers have stored a prompt."""
        return all(group.ready for group in self.groups)

    @property
    def steps(self) -> int:
        """Tokens that every sequence can still get."""
        return min(group.steps for group in self.groups)

    def store_of(self, layer: int) -> StaticStore:
        """The tensors of a layer's group."""
        return self._places[layer][0].store

    def allocate(self, keys: Tensor, values: Tensor) -> bool:
        """See :meth:`ModelCache.allocate`."""
        self._turns.check(0)
        fresh = [group.allocate(keys, values) for group in self.groups]
        return any(fresh)

    def decode(self, layer: int, step: Step, **options: Any) -> Tensor:
        """See :meth:`ModelCache.decode`."""
        group, at = self._places[layer]
        with self._turns.take(layer):
            return group.decode(at, step, **options)

    def begin(self, step: Step) -> None:
        """See :meth:`ModelCache.begin`."""
        self._turns.check(0)
        for group in self.groups:
            group.begin(step)

    def attend(self, layer: int, step: Step, visible: Tensor | None, **options: Any) -> Tensor:
        """See :meth:`ModelCache.attend`."""
        group, at = self._places[layer]
        return group.attend(at, step, visible, **options)

    def append(self, layer: int, step: Step) -> None:
        """See :meth:`ModelCache.append`."""
        group, at = self._places[layer]
        with self._turns.take(layer):
            group.append(at, step)

    def reset(self) -> None:
        """Forget all tokens."""
        self._turns.reset()
        for group in self.groups:
            group.reset()

    def memory(self) -> MemoryReport:
        """Bytes held, by part. Waits for the device."""
        report = MemoryReport()
        for group in self.groups:
            report += group.memory()
        return report
