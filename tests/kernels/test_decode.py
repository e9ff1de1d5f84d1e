"""The entrance to attention of a decode step, by its torch path: what it reads, writes and refuses."""

import dataclasses

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.kernels.decode import decode_attention
from mixkvq.layers import LayerCache, Step
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store.tensors import CacheTensors


def filled(config: MixKVQConfig, pads: tuple[int, ...], length: int) -> LayerCache:
    step = random_step(len(pads), length)
    real = torch.arange(length) >= torch.tensor(pads)[:, None]
    cache = layer_cache(config, step)
    cache.append(Step(step.query, step.keys, step.values, real))
    return cache


def roomy(cache: CacheTensors) -> CacheTensors:
    """The same with room to append, and NaN and nonsense wherever nothing is stored."""
    slots = cache.sinks + cache.layout.tokens
    _, ends = cache.places()
    dense = []
    for tensor in (cache.dense_keys, cache.dense_values):
        wide = tensor.new_full((*tensor.shape[:2], slots + 8, tensor.shape[3]), float("nan"))
        for row, end in enumerate(ends.tolist()):
            wide[row, :, :end] = tensor[row, :, :end]
        dense.append(wide)
    table = torch.cat([cache.table, torch.full((len(cache.table), 3), 10**6, dtype=torch.int32)], 1)
    blocks, _ = cache.places()
    table[torch.arange(table.shape[1]) >= blocks[:, None]] = 10**6
    return dataclasses.replace(cache, dense_keys=dense[0], dense_values=dense[1], table=table)


@pytest.mark.parametrize("new", [1, 8])
@pytest.mark.parametrize("pads", [(0, 0), (0, 599, 600, 333)])
def test_it_equals_the_growing_cache(config: MixKVQConfig, pads: tuple[int, ...], new: int):
    config = config.replace(recent=0.0)  # kernels find tokens by their numbers
    cache, step = filled(config, pads, 600), random_step(len(pads), new)
    sinks = torch.randn(4)
    options = {"scaling": 0.25, "softcap": 4.0, "sinks": sinks}
    expected = cache.attend(step, None, **options)
    for tensors in (cache.tensors(), roomy(cache.tensors())):
        output = decode_attention(step.query, step.keys, step.values, tensors, **options)
        assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("new", [1, 5])
def test_tokens_are_appended_behind_those_there_are(new: int):
    cache = filled(MixKVQConfig.preset("default"), (0, 598, 600, 81), 600)
    tensors, step = roomy(cache.tensors()), random_step(4, new)
    before, lengths = tensors.dense_keys.clone(), tensors.lengths.clone()
    decode_attention(step.query, step.keys, step.values, tensors, scaling=1.0, append=True)
    assert torch.equal(tensors.lengths, lengths)
    for row, slot in enumerate((4 + 596 % 128, 2, 0, 4 + 515 % 128)):
        place = slice(slot, slot + new)
        assert torch.equal(tensors.dense_keys[row, :, place], step.keys[row])
        assert torch.equal(tensors.dense_values[row, :, place], step.values[row])
        tensors.dense_keys[row, :, place] = before[row, :, place]
    assert torch.equal(tensors.dense_keys.isnan(), before.isnan())


def test_queries_are_counted():
    cache, step = filled(MixKVQConfig.preset("kivi-2"), (0, 50), 200), random_step(2, 3)
    ours, theirs = (QueryStatistics(2, 2, 16, torch.device("cpu")) for _ in range(2))
    theirs.update(step.query)
    decode_attention(step.query, step.keys, step.values, cache.tensors(), scaling=1.0, statistics=ours)
    assert torch.equal(ours.total, theirs.total)
    assert torch.equal(ours.count, theirs.count)


def test_books_on_the_device_follow_those_on_the_host():
    cache = filled(MixKVQConfig.parse("kivi-2:residual_length=32"), (0, 50), 100)
    held = cache.tensors().lengths
    for _ in range(9):
        cache.append(random_step(2, 1))
        assert cache.tensors().lengths.tolist() == cache.store.lengths
    assert cache.tensors().lengths is held  # counted up where they are
    for change in (
        lambda: cache.append(random_step(2, 40)),
        lambda: cache.crop([3, 60]),
        lambda: cache.select([1, 0, 1]),
        lambda: cache.append(random_step(3, 33)),
    ):
        change()
        tensors = cache.tensors()
        assert tensors.lengths.tolist() == cache.store.lengths
        for row, table in enumerate(cache.store.tables):
            assert tensors.table[row, : len(table)].tolist() == table
        assert cache.memory().total == sum(tensor.nbytes for tensor in cache.store.tensors())


def test_what_it_refuses():
    cache, step = filled(MixKVQConfig.preset("kivi-2"), (0,), 100), random_step(1, 9)
    with pytest.raises(ValueError, match="has 1 to 8 new tokens; 9 were given"):
        decode_attention(step.query, step.keys, step.values, cache.tensors(), scaling=1.0)
    step = random_step(1, 1)
    with pytest.raises(ValueError, match="There is no kernel 'fast'"):
        decode_attention(step.query, step.keys, step.values, cache.tensors(), scaling=1.0, kernel="fast")
    with pytest.raises(ValueError, match="The kernel 'cuda' cannot serve this step"):
        decode_attention(step.query, step.keys, step.values, cache.tensors(), scaling=1.0, kernel="cuda")
    with pytest.raises(ValueError, match="To append 1 tokens the cache needs 129 dense slots, it has 128"):
        decode_attention(step.query, step.keys, step.values, cache.tensors(), scaling=1.0, append=True)
