"""KVTuner's search space for a model: which pairs of widths each layer is offered, and which layers share theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixkvq.adapters.transformers import MixKVQCache
from mixkvq.adapters.transformers.attention import attention_forward
from mixkvq.adapters.transformers.layer import MixKVQLayer
from mixkvq.calibrate.errors import CalibrationError, needed
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.calibrate.observe import observed
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.fidelity import appends
from mixkvq.evaluate.statistics import pareto_front
from mixkvq.kernels.partial import causal
from mixkvq.policies.kvtuner import PAIRS, pair_fields

#: Layers of a cluster have errors within this factor of each other, whatever the pair.
SIMILAR = 2


@dataclass(frozen=True)
class PairErrors:
    """What one layer's pairs, in the order of :data:`PAIRS`, cost.

    Attributes:
        errors: of the attention output, relative to its norm, mean over tokens.
        bits: honest bits per element.
    """

    errors: tuple[float, ...]
    bits: tuple[float, ...]

    @property
    def pareto(self) -> tuple[int, ...]:
        """Numbers of the pairs that none beats in both, by falling size."""
        return tuple(reversed(pareto_front(list(zip(self.bits, self.errors, strict=True)))))


@dataclass(frozen=True)
class Cluster:
    """Layers that are to have the same pair, and the numbers of the pairs that they may have."""

    layers: tuple[int, ...]
    pairs: tuple[int, ...]


@torch.inference_mode()
def output_errors(
    model: PreTrainedModel, windows: Tensor, base: MixKVQConfig, advance: Callable[[], None] = lambda: None
) -> dict[int, PairErrors]:
    """What every pair does to the attention output of every layer, all other layers exact.

    Keys and values of a full-precision pass are stored by the real cache, block by block, and its attention is compared
    with the exact one where it has something packed to read.

    Args:
        windows: ``[N, T]`` tokens.
        advance: called after each window.

    Returns:
        By layer number.

    Raises:
        CalibrationError: the windows hold a single block, which is never read packed.
    """
    bounds = appends(windows.shape[1], base)
    if len(bounds) < 2:
        raise CalibrationError(
            f"Windows of {windows.shape[1]} tokens hold one block of {base.residual_length}, which no later token "
            "reads: take longer ones."
        )
    replay = _Replay(quantized_layers(model), bounds)
    for window in windows.to(model.device):
        replay.caches = [MixKVQCache(model.config, base.replace(**pair_fields(pair))) for pair in PAIRS]
        with observed(model, replay):
            model(window[None], use_cache=False, logits_to_keep=1)
        advance()
    return {layer: replay.found(layer) for layer in replay.layers}


class _Replay:
    """An :class:`~mixkvq.calibrate.observe.Observer` that reads every layer's tokens with several caches."""

    def __init__(self, layers: Sequence[int], bounds: Sequence[tuple[int, int]]) -> None:
        self.layers, self.bounds = layers, bounds
        self.caches: list[MixKVQCache] = []
        self.errors = {layer: torch.zeros(len(PAIRS), dtype=torch.float64) for layer in layers}
        self.count = 0

    def attend(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        length = query.shape[2]
        mask = causal(length, length, query.device)[None, None]
        exact = attention_forward(module, query, key, value, mask, **options)[0]
        first = self.bounds[1][0]
        norm = exact[:, first:].float().flatten(2).norm(dim=-1)
        for at, cache in enumerate(self.caches):
            parts = []
            for start, stop in self.bounds:
                keys, values = self._stored(cache, layer).update(key[:, :, start:stop], value[:, :, start:stop])
                parts.append(attention_forward(module, query[:, :, start:stop], keys, values, None, **options)[0])
            error = (torch.cat(parts, 1) - exact)[:, first:].float().flatten(2).norm(dim=-1)
            self.errors[layer][at] += float((error / norm.clamp(min=torch.finfo(norm.dtype).tiny)).sum())
        if layer == self.layers[0]:
            self.count += norm.numel()
        return exact

    def _stored(self, cache: MixKVQCache, layer: int) -> MixKVQLayer:
        return cache.quantized_layers[self.layers.index(layer)]

    def found(self, layer: int) -> PairErrors:
        """A layer's means."""
        bits = tuple(self._stored(cache, layer).memory().bits for cache in self.caches)
        return PairErrors(tuple((self.errors[layer] / self.count).tolist()), bits)


def mean_bits(costs: Mapping[int, PairErrors]) -> list[float]:
    """Honest bits of each pair, mean over layers."""
    return [sum(each) / len(costs) for each in zip(*(cost.bits for cost in costs.values()), strict=True)]


def check_floor(costs: Mapping[int, PairErrors], bits: float) -> None:
    """Refuse a goal that not even the smallest pairs reach.

    Raises:
        CalibrationError: it is below their honest bits.
    """
    floor = min(mean_bits(costs))
    if not bits >= floor - 1e-9:
        raise CalibrationError(
            f"{bits:.3g} bits are below the floor of {floor:.3g}: {PAIRS[-1][0]} bits for all keys and "
            f"{PAIRS[-1][1]} for all values take so many with their scales and zeros."
        )


def cluster_layers(costs: Mapping[int, PairErrors], similar: float = SIMILAR) -> list[Cluster]:
    """Layers with the same Pareto set of pairs and errors within a factor of ``similar`` of each other, pair by pair.

    Complete linkage on the largest difference of the logarithms, which is what keeps the factor.

    Returns:
        Clusters by their first layer.

    Raises:
        CalibrationError: SciPy is missing.
    """
    hierarchy = needed("scipy.cluster.hierarchy")
    by_pairs: dict[tuple[int, ...], list[int]] = {}
    for layer, cost in costs.items():
        by_pairs.setdefault(cost.pareto, []).append(layer)
    clusters = []
    for pairs, layers in by_pairs.items():
        numbers = [1]
        if len(layers) > 1:
            tiny = torch.finfo(torch.float32).tiny
            logs = [[math.log(max(costs[layer].errors[i], tiny)) for i in pairs] for layer in layers]
            tree = hierarchy.linkage(logs, "complete", metric="chebyshev")
            numbers = hierarchy.fcluster(tree, math.log(similar), criterion="distance").tolist()
        for number in sorted(set(numbers)):
            own = tuple(layer for layer, other in zip(layers, numbers, strict=True) if other == number)
            clusters.append(Cluster(own, pairs))
    return sorted(clusters, key=lambda cluster: cluster.layers)


def layer_fields(clusters: Sequence[Cluster], chosen: Sequence[int]) -> dict[int, dict[str, int]]:
    """Fields by layer, for the number of each cluster's pair."""
    return {
        layer: pair_fields(PAIRS[pair])
        for cluster, pair in zip(clusters, chosen, strict=True)
        for layer in cluster.layers
    }


def first_choices(clusters: Sequence[Cluster], bits: Sequence[float], goal: float) -> list[tuple[int, ...]]:
    """Where a search starts: all clusters alike, and near the goal each cluster alone one step wider.

    Args:
        bits: honest bits of each pair.
        goal: bits to spend at most.

    Returns:
        Numbers of the clusters' pairs; none that a cluster may not have.
    """
    alike = [(pair,) * len(clusters) for pair in range(len(PAIRS))]
    near = next((pair for pair, each in enumerate(bits) if each <= goal), len(PAIRS) - 1)
    wider = [tuple(near - (other == at) for other in range(len(clusters))) for at in range(len(clusters)) if near > 0]
    return [
        choice
        for choice in alike + wider
        if all(pair in cluster.pairs for pair, cluster in zip(choice, clusters, strict=True))
    ]
