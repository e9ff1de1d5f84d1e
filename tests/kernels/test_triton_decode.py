"""The Triton decode kernel equals attention over the store's dequantized content. Runs on a GPU, or interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from conftest import layer_cache, random_step
from kernels.helpers import cache_tensors, current_devices
from kernels.test_packed import oracle
from mixkvq import MixKVQConfig
from mixkvq.kernels import tickets
from mixkvq.kernels.triton import available, decode
from mixkvq.kernels.triton.decode import decode_attention
from mixkvq.layers import LayerCache, Step
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store.tensors import CacheTensors

pytestmark = pytest.mark.skipif(
    not available(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    reason="Triton needs a GPU or TRITON_INTERPRET=1",
)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch):
    """What is allocated without being filled holds NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    # A launch that failed leaves counters behind that would spoil the next test's.
    monkeypatch.setattr(tickets, "_TICKETS", {})


def filled(config: MixKVQConfig, lengths: list[int], device: torch.device, **shape) -> LayerCache:
    """A cache with sequences of the given lengths, on a device."""
    past = random_step(len(lengths), max(*lengths, 1), **shape)
    real = torch.arange(past.length) >= past.length - torch.tensor(lengths)[:, None]
    past = Step(*(x.to(device) for x in (past.query, past.keys, past.values, real)))
    cache = layer_cache(config, past)
    cache.append(past)
    return cache


def new_tokens(batch: int, length: int, device: torch.device, **shape) -> Step:
    step = random_step(batch, length, **shape)
    return Step(*(x.to(device) for x in (step.query, step.keys, step.values)))


def run(step: Step, cache: CacheTensors, **options) -> torch.Tensor:
    return decode_attention(step.query, step.keys, step.values, cache, **options)


def check(cache: LayerCache, step: Step, **options) -> None:
    """The kernel's output for every sequence is the oracle's, within what the queries' type can hold."""
    options = {"scaling": step.query.shape[-1] ** -0.5, **options}
    output = run(step, cache_tensors(cache), **options)
    assert output.shape == (*step.query.shape[:3], step.values.shape[3])
    assert output.dtype == step.query.dtype
    for row in range(len(output)):
        expected = oracle(cache, step, row, **options)
        if step.query.dtype == torch.float32:
            torch.testing.assert_close(output[row], expected, atol=3e-5, rtol=1e-4)
        else:
            error = (output[row].float() - expected) / expected.square().mean().sqrt()
            assert error.square().mean().sqrt() < 2e-2
            assert error.abs().max() < 1e-1


def test_it_equals_the_oracle(kernel_config: MixKVQConfig, device: torch.device):
    check(filled(kernel_config, [300, 40], device), new_tokens(2, 3, device))


def test_bfloat16_queries(kernel_config: MixKVQConfig, device: torch.device):
    shape = {"dtype": torch.bfloat16, "dim": 32, "heads": 2, "kv_heads": 1}
    check(filled(kernel_config, [270], device, **shape), new_tokens(1, 1, device, **shape))


@pytest.mark.parametrize("preset", ["default", "bf16", "paper:tau_bf16=2.2,tau_uint4=1.2", "kivi-2:key_bits=8"])
def test_float16_queries(preset: str, device: torch.device):
    shape = {"dtype": torch.float16, "dim": 32}
    check(filled(MixKVQConfig.parse(preset), [135], device, **shape), new_tokens(1, 2, device, **shape))


@pytest.mark.parametrize("lengths", [[0], [3], [4], [132], [0, 132, 3, 260, 5, 131]])
def test_lengths(lengths: list[int], device: torch.device):
    cache = filled(MixKVQConfig.preset("default"), lengths, device)
    check(cache, new_tokens(len(lengths), 2, device))


def test_many_splits_with_nothing_to_do(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 100)
    check(filled(MixKVQConfig.parse("kivi-2:residual_length=32"), [700, 130, 20], device), new_tokens(3, 1, device))


@pytest.mark.parametrize("length", [16, 48, 64, 144])
def test_page_lengths_with_words_that_fill_no_tile(length: int, device: torch.device):
    config = MixKVQConfig.preset("default", residual_length=length, key_group=length, value_bits=3)
    check(filled(config, [3 * length + 9], device), new_tokens(1, 1, device))


@pytest.mark.parametrize("group", [8, 24, 48])
def test_key_groups_that_divide_no_tile(group: int, device: torch.device):
    config = MixKVQConfig.preset("default", residual_length=48, key_group=group)
    check(filled(config, [100], device), new_tokens(1, 1, device))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "new"),
    [
        (1, 1, 64, 1),
        (9, 3, 24, 8),
        (16, 1, 64, 2),
        (8, 8, 96, 1),
        (6, 3, 5, 2),
        (4, 2, 80, 1),
        pytest.param(8, 2, 128, 8, marks=pytest.mark.slow),
        pytest.param(4, 2, 256, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_shapes(heads: int, kv_heads: int, dim: int, new: int, dtype: torch.dtype, device: torch.device):
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype}
    check(filled(MixKVQConfig.preset("default"), [150], device, **shape), new_tokens(1, new, device, **shape))


def test_values_of_another_dimension(device: torch.device):
    past, step = new_tokens(1, 300, device, dim=24), new_tokens(1, 2, device, dim=24)
    past, step = (Step(x.query, x.keys, x.values[..., :16].contiguous()) for x in (past, step))
    cache = layer_cache(MixKVQConfig.preset("default"), past)
    cache.append(past)
    check(cache, step)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cap_and_model_sinks(options: dict, dtype: torch.dtype, device: torch.device):
    if "sinks" in options:
        options = {**options, "sinks": torch.randn(8, device=device) * 3}
    shape = {"heads": 8, "dtype": dtype}
    cache = filled(MixKVQConfig.preset("default"), [300, 2], device, **shape)
    check(cache, new_tokens(2, 2, device, **shape), scaling=0.3, **options)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_extreme_scales(scale: float, device: torch.device):
    past, step = new_tokens(1, 300, device), new_tokens(1, 1, device)
    past = Step(past.query, past.keys * scale, past.values * scale)
    cache = layer_cache(MixKVQConfig.preset("default"), past)
    cache.append(past)
    output = run(step, cache_tensors(cache), scaling=1e-2 / scale)
    expected = oracle(cache, step, 0, scaling=1e-2 / scale)
    torch.testing.assert_close(output[0], expected, rtol=1e-3, atol=1e-4 * scale)


def test_tensors_of_any_strides(device: torch.device):
    cache = filled(MixKVQConfig.preset("default"), [140, 20], device)
    step = new_tokens(2, 3, device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (step.query, step.keys, step.values)]
    broken = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (step.query, step.keys, step.values)]
    check(cache, Step(*strided))
    check(cache, Step(*broken))


@pytest.mark.parametrize("preset", ["default", "bf16", "paper:tau_bf16=2.2,tau_uint4=1.2"])
def test_a_sequence_that_is_not_finite_leaves_the_others_alone(preset: str, device: torch.device):
    past, step = new_tokens(2, 140, device), new_tokens(2, 1, device)
    caches = [layer_cache(MixKVQConfig.parse(preset), past) for _ in range(2)]
    caches[0].append(past)
    past.keys[1, :, 100:] = torch.nan
    caches[1].append(past)
    clean, broken = (run(step, cache_tensors(cache), scaling=0.25) for cache in caches)
    torch.testing.assert_close(broken[0], clean[0])


@pytest.mark.parametrize("lengths", [[0, 3], [4, 129], [131, 300]])
def test_append_writes_the_next_slots_and_nothing_else(lengths: list[int], device: torch.device):
    cache, step = filled(MixKVQConfig.preset("default"), lengths, device), new_tokens(2, 5, device)
    tensors = cache_tensors(cache)
    before = cache_tensors(cache)
    output = run(step, tensors, scaling=0.25, append=True)
    assert torch.equal(output, run(step, before, scaling=0.25))
    for row in range(2):
        slots = slice(cache.store._filled(row), cache.store._filled(row) + 5)
        before.dense_keys[row, :, slots] = step.keys[row]
        before.dense_values[row, :, slots] = step.values[row]
    for name in ("dense_keys", "dense_values", "lengths", "table", "pages"):
        assert torch.equal(getattr(tensors, name).nan_to_num(7), getattr(before, name).nan_to_num(7)), name


@pytest.mark.parametrize(("heads", "new"), [(6, 1), (32, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_query_statistics(heads: int, new: int, dtype: torch.dtype, device: torch.device):
    shape = {"heads": heads, "dim": 24, "dtype": dtype}
    cache, step = filled(MixKVQConfig.preset("default"), [20, 5], device, **shape), new_tokens(2, new, device, **shape)
    expected = QueryStatistics(2, 2, 24, device, sample_dtype=dtype)
    expected.total += 0.5
    expected.count += 3
    total, count, samples = (x.clone() for x in expected.tensors())
    for _ in range(2):
        expected.update(step.query)
        expected.sample(step.query, torch.tensor([20, 5], device=device))
        run(step, cache_tensors(cache), scaling=0.2, statistics=QueryStatistics.of(total, count, samples))
    torch.testing.assert_close(total, expected.total)
    assert torch.equal(count, expected.count)
    assert samples.any()
    assert torch.equal(samples, expected.samples)


def test_counters_are_ready_for_the_next_call(device: torch.device):
    cache = filled(MixKVQConfig.preset("default"), [300], device)
    tensors, step = cache_tensors(cache), new_tokens(1, 1, device)
    first = run(step, tensors, scaling=0.25)
    assert torch.equal(run(step, tensors, scaling=0.25), first)
    assert not any(counters.any() for counters in tickets._TICKETS.values())


def test_it_is_launched_where_its_tensors_are(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    cache, step = cache_tensors(filled(MixKVQConfig.preset("default"), [3], device)), new_tokens(1, 1, device)
    found = current_devices(monkeypatch, decode, "decode_kernel", lambda: run(step, cache, scaling=0.25))
    assert found == [step.query.device]
