"""Measurements of a whole model, at a tiny size."""

import gc
import weakref

import pytest
import torch

from mixkvq import MixKVQConfig, UnsupportedModelError
from mixkvq.bench import generate
from mixkvq.bench.capacity import NoRoomError, bench_capacity, largest
from mixkvq.bench.decoding import PackedDecoding, RandomBlocks, SplitKVDecoding, StockDecoding
from mixkvq.bench.generate import bench_generate, measure
from mixkvq.bench.prefill import bench_prefill
from mixkvq.bench.profiling import flush_kernels
from mixkvq.bench.shapes import random_model, weight_bytes
from models import tiny_model

CPU = torch.device("cpu")
#: The split-KV kernel runs on a GPU, or on a CPU by an interpreter that is there when no GPU is.
KERNEL_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CACHES = {"default": MixKVQConfig.preset("default")}


@pytest.fixture(scope="module")
def model():
    return random_model("tiny", torch.float32, CPU)


def test_generate(model):
    rows = bench_generate(model, [(2, 300), (1, 200)], CACHES, steps=2)
    assert [(row.batch, row.context, row.cache) for row in rows] == [
        (2, 300, "bf16"), (2, 300, "default"), (1, 200, "bf16"), (1, 200, "default"),
    ]  # fmt: skip
    stock, ours = rows[:2]
    assert stock.speed_up == 1
    assert ours.speed_up == pytest.approx(ours.tokens_per_second / stock.tokens_per_second)
    assert ours.tokens_per_second == pytest.approx(2e3 / ours.step_ms)
    assert 0 < ours.cache_bytes < stock.cache_bytes
    assert ours.weight_bytes == weight_bytes(model)


def test_memory_that_runs_out_is_a_row_without_figures(model, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(generate, "StockDecoding", full)
    rows = bench_generate(model, [(1, 200)], CACHES, steps=1)
    assert (rows[0].steps, rows[0].tokens_per_second, rows[1].speed_up) == (0, 0, 0)
    assert rows[1].tokens_per_second > 0


def test_split_kv_decodes_as_sdpa_does():
    model = random_model("tiny", torch.float32, KERNEL_DEVICE)
    outputs = []
    for kind in (StockDecoding, SplitKVDecoding):
        torch.manual_seed(0)
        decoding = kind(model, 2, 70, 10)
        with torch.inference_mode():
            tokens = []
            for _ in range(4):
                decoding.step()
                tokens.append(decoding.tokens.clone())
        outputs.append(torch.cat(tokens, 1))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["split-kv", "sdpa", "packed"])
def test_a_cache_that_was_measured_is_not_kept(kind: str):
    model = random_model("tiny", torch.float32, KERNEL_DEVICE)
    if kind == "packed":
        decoding = PackedDecoding(model, RandomBlocks(model, CACHES["default"]), 1, 200, 4)
    else:
        decoding = {"split-kv": SplitKVDecoding, "sdpa": StockDecoding}[kind](model, 1, 20, 4)
    decoding.step()
    cache = weakref.ref(decoding.cache)
    del decoding
    gc.collect()
    assert cache() is None


def test_models_with_windows_are_refused():
    with pytest.raises(UnsupportedModelError, match="layers without full attention"):
        measure(lambda *sizes: StockDecoding(tiny_model("gemma2"), *sizes), 1, 100, 1)


def test_capacity(model):
    cache = 10 * 2 * 2 * 2 * 16 * 4 * 440  # of some ten sequences in 32 bits
    rows = bench_capacity(model, 300, CACHES, memory=weight_bytes(model) + cache, steps=2)
    assert [row.cache for row in rows] == ["bf16", "default"]
    bf16, ours = rows
    assert (bf16.batch_ratio, bf16.speed_up) == (1, 1)
    assert ours.batch_ratio == ours.batch / bf16.batch > 1.5
    for row in rows:
        assert row.cache_bytes <= cache
        assert row.cache_bytes * (row.batch + 1) / row.batch > 0.95 * cache
    with pytest.raises(NoRoomError, match="Not even one sequence of 300 tokens"):
        bench_capacity(model, 300, CACHES, memory=weight_bytes(model))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 17, 64, 100])
def test_the_largest_number(limit: int):
    asked = []
    assert largest(lambda n: asked.append(n) or n <= limit) == limit
    assert len(asked) == len(set(asked)) <= 14


def test_prefill(model):
    rows = bench_prefill(model, [(2, 200)], CACHES, repeats=2)
    assert [row.cache for row in rows] == ["bf16", "default"]
    assert rows[0].time_ratio == 1
    assert rows[1].time_ratio == pytest.approx(rows[1].seconds / rows[0].seconds)
    assert rows[1].tokens_per_second == pytest.approx(400 / rows[1].seconds)


def test_flush_kernels_are_found_by_name():
    names = flush_kernels()
    assert any("plan" in name for name in names)
    assert any("pack" in name for name in names)
    assert any("advance" in name for name in names)
    assert not any("attend" in name for name in names)
