"""Caches filled without a prompt hold what they say."""

import pytest
import torch

from mixkvq import ConfigError, MixKVQConfig
from mixkvq.bench.decoding import PackedDecoding, RandomBlocks
from mixkvq.bench.kernel import KernelShape, WrongResultError, bench_kernel
from mixkvq.bench.shapes import SHAPES, random_model, weight_bytes
from mixkvq.bench.synthetic import PackedBlocks, bytes_read, filled_tensors
from mixkvq.bench.timing import Timer
from mixkvq.kernels import decode
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.store.tensors import CacheTensors
from mixkvq.store.view import PackedPages

CPU = torch.device("cpu")
#: Where Triton runs: interpreted without a GPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: The last promotes more channels than a cache makes room for before it has seen any.
CACHES = ["default", "kivi-4", "bf16", "paper:tau_bf16=2.2,tau_uint4=1.2", "paper:tau_bf16=0.9,tau_uint4=0.1"]


def blocks(cache: str, count: int = 3) -> PackedBlocks:
    torch.manual_seed(0)
    config = MixKVQConfig.parse(cache)
    return PackedBlocks(config, group=2, kv_heads=2, dim=16, dtype=torch.float32, device=CPU, count=count)


def check_content(source: PackedBlocks, cache: CacheTensors, row: int) -> None:
    pages = PackedPages.of_cache(cache)
    assert pages is not None
    keys, values = dequantize_pages(pages, row, rotated=cache.rotated)
    count = keys.shape[1] // cache.layout.tokens
    expected_keys, expected_values = source.content(cache.table[row, :count])
    assert torch.equal(keys, expected_keys)
    assert torch.allclose(values, expected_values, atol=1e-5)


def test_a_share_out_of_the_pages_is_refused():
    with pytest.raises(ConfigError, match=r"No kernel reads a cache .* \(recent=0.1\)\. Set recent to 0"):
        blocks("kvmix")
    assert len(blocks("kvmix:recent=0").pages) == 3


@pytest.mark.parametrize("cache", [*CACHES, "kvquant-2"])
def test_copies_are_read_as_their_sources(cache: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixkvq.bench.synthetic.COPIED_AT_ONCE", 1)  # a page at a time
    source = blocks(cache)
    filled = filled_tensors(source, 2, 700)
    assert filled.table.unique().numel() == filled.table.numel() == len(filled.pages)
    for row in range(2):
        check_content(source, filled, row)


def test_bytes_read_are_those_of_the_tensors():
    filled = filled_tensors(blocks("kivi-2:sinks=4"), 2, 4 + 128 * 3 + 10)
    dense = 2 * 2 * 2 * 14 * 16 * 4
    assert bytes_read(filled, 4 + 128 * 3 + 10) == 6 * filled.layout.page.nbytes + dense
    short = filled_tensors(blocks("kivi-2"), 2, 5)
    assert bytes_read(short, 5) == 2 * 2 * 2 * 5 * 16 * 4


@pytest.mark.parametrize("cache", CACHES)
def test_a_filled_static_cache_decodes_what_it_holds(cache: str):
    model = random_model("tiny", torch.float32, CPU)
    source = RandomBlocks(model, MixKVQConfig.parse(cache))
    with torch.inference_mode():
        decoding = PackedDecoding(model, source, 2, 500, 200)
        store = decoding.static_cache.state.cache.store
        for layer in range(2):
            for row in range(2):
                check_content(source.of(source.config), store.tensors(layer), row)
        for _ in range(160):  # over the end of a block
            decoding.step()
    assert store.books.lengths.tolist() == [660, 660]
    assert decoding.static_cache.get_seq_length() == 660
    assert decoding.cache_bytes() == decoding.static_cache.memory().total


def test_layers_with_settings_of_their_own_are_filled_with_blocks_of_their_own():
    model = random_model("tiny", torch.float32, CPU)
    config = MixKVQConfig.preset("default", layers=[{"budget": 3.0}, {"value_bits": 4}])
    source = RandomBlocks(model, config)
    with torch.inference_mode():
        decoding = PackedDecoding(model, source, 2, 500, 200)
        groups = decoding.static_cache.state.cache.groups
        assert [group.config for group in groups] == [config.for_layer(0), config.for_layer(1)]
        for group in groups:
            check_content(source.of(group.config), group.store.tensors(0), 1)
        decoding.step()
    assert decoding.static_cache.get_seq_length() == 501


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_bench_kernel_times_and_checks(kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixkvq.bench.baseline.SPLIT_CONFIGS", _two_configs())
    monkeypatch.setattr("mixkvq.bench.timing.WARM_UP", 0)
    options = {"kernel": kernel, "repeats": 1, "device": DEVICE, "timer": Timer(DEVICE, 1 << 12)}
    shapes = [KernelShape(2, 2, 2, 16, 300)]
    rows = bench_kernel(shapes, {"default": MixKVQConfig.parse("default")}, **options)
    bf16, ours = rows[:-1], rows[-1]
    assert {row.cache for row in bf16} == {"bf16"}
    assert {row.bytes_read for row in bf16} == {2 * 2 * 2 * 300 * 16 * 2}
    assert max(row.speed_up for row in bf16) == 1
    assert (ours.cache, ours.kernel) == ("default", f"mixkvq {kernel}")
    assert 0 < ours.error < 0.05
    assert ours.bytes_read < bf16[0].bytes_read

    def wrong(*arguments: object, **_: object) -> torch.Tensor:
        return torch.zeros_like(arguments[0])

    monkeypatch.setitem(decode.KERNELS, kernel, wrong)
    with pytest.raises(WrongResultError, match="differs from the reference by 1"):
        bench_kernel(shapes, {"default": MixKVQConfig.parse("default")}, **options)


def _two_configs() -> tuple:
    from mixkvq.bench.baseline import SPLIT_CONFIGS

    return SPLIT_CONFIGS[:1]


def test_shapes_are_those_of_their_names():
    with torch.device("meta"):
        sizes = {name: weight_bytes(random_model(name, torch.bfloat16, torch.device("meta"))) / 2e9 for name in SHAPES}
    assert sizes["llama-3.1-8b"] == pytest.approx(8.03, abs=0.01)
    assert sizes["qwen3-8b"] == pytest.approx(8.19, abs=0.01)
    assert sizes["llama-2-13b"] == pytest.approx(13.02, abs=0.01)
