"""The same measurements where they are meant to run, at a tiny size: graphs, profiles, limits of memory."""

import pytest
import torch

from mixkvq import MixKVQConfig
from mixkvq.bench import decoding
from mixkvq.bench.capacity import bench_capacity
from mixkvq.bench.generate import bench_generate
from mixkvq.bench.kernel import KernelShape, bench_kernel
from mixkvq.bench.prefill import bench_prefill
from mixkvq.bench.shapes import random_model, weight_bytes
from mixkvq.bench.timing import Timer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
CACHES = {name: MixKVQConfig.parse(name) for name in ("default", "paper:tau_bf16=5.2,tau_uint4=3.214")}


@pytest.fixture(scope="module")
def model():
    return random_model("tiny", torch.bfloat16, DEVICE)


@pytest.mark.parametrize(("group", "dim"), [(4, 128), (1, 64)])
def test_kernel(group: int, dim: int):
    shapes = [KernelShape(2, 2, group, dim, 1000), KernelShape(1, 2, group, dim, 5000)]
    rows = bench_kernel(shapes, CACHES, repeats=5)
    kernels = {row.kernel.partition(" (")[0] for row in rows}
    assert {"Triton split-KV", "SDPA flash, group as tile", "mixkvq cuda"} <= kernels
    assert all(0 < row.error < 0.05 and row.time_us > 0 for row in rows)


def test_generate_counts_flushes(model):
    rows = bench_generate(model, [(3, 500)], CACHES, steps=10)
    assert [row.kernel for row in rows] == ["Triton split-KV", "SDPA", "mixkvq", "mixkvq"]
    assert all(row.steps == 10 and row.peak_bytes > row.cache_bytes for row in rows)
    assert all(0 < row.flush_share < 1 for row in rows[2:])


def test_capacity_is_what_fits(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "FLUSHED", 1 << 20)  # what tuning holds would be most of so little memory
    memory = weight_bytes(model) + 2**30  # fifty sequences in 16 bits, and much beside what a CUDA graph takes
    before = torch.cuda.memory_reserved()
    rows = bench_capacity(model, 80_000, {"default": CACHES["default"]}, memory=before + memory, steps=4)
    assert rows[0].kernel == "Triton split-KV"
    assert rows[1].batch > rows[0].batch, rows
    assert all(row.peak_bytes <= before + memory for row in rows), (before, memory, rows)


def test_prefill(model):
    rows = bench_prefill(model, [(1, 1000)], CACHES, repeats=1)
    assert all(row.seconds > 0 and row.peak_bytes > 0 for row in rows)


def test_times_do_not_depend_on_what_ran_before():
    timer = Timer(DEVICE)
    source = torch.randn(1 << 22, device=DEVICE)  # 16 MB, which a level-2 cache would keep
    times = timer.medians({"a": lambda: source.sum(), "b": lambda: source.sum()}, 20)
    assert 0.7 < times["a"] / times["b"] < 1.4
