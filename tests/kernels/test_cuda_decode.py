"""The CUDA decode kernel equals the reference; without a GPU it runs compiled for the CPU."""

import emulator
import pytest
import torch
from helpers import cache_tensors
from test_packed import oracle

from conftest import layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.kernels import tickets
from mixkvq.kernels.cuda import decode, module
from mixkvq.layers import LayerCache, Step
from mixkvq.quant.salience import QueryStatistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and emulator.COMPILER is None, reason="needs a GPU or g++")

#: What the kernel serves: all widths, group sizes and tiers.
SERVED = [
    "default",
    "default:budget=4",
    "default:budget=2",
    "kitty-pro",
    "kivi-2",
    "kivi-2:key_group=64,value_group=64,sinks=7",
    "kivi-4",
    "kivi-2:value_bits=4",
    "default:value_bits=3",
    "default:value_bits=8",
    "quality:key_bits=3",
    "quality:key_bits=8,key_group=128",
    "kivi-2:key_bits=3,value_bits=3",
    "kivi-2:key_bits=8,value_bits=8",
    "kivi-2:key_bits=3,value_bits=8,key_group=64,value_group=64",
    "kivi-4:key_bits=8,value_bits=3,sinks=5",
    "paper:tau_bf16=2.2,tau_uint4=1.2",
    "paper:tau_bf16=1e9,tau_uint4=0.1",
    "paper:tau_bf16=0.5,tau_uint4=0.4",
]


@pytest.fixture(autouse=True)
def _emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*size: int, **options: object) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(decode.torch, "empty", poisoned)
    if DEVICE == "cpu":
        monkeypatch.setattr(decode, "load_kernel", emulator.load_kernel)
        monkeypatch.setattr(decode, "has_bindings", lambda: True)
        monkeypatch.setattr(decode, "multiprocessors", lambda device: 6)
        monkeypatch.setattr(module, "capability", lambda device: (8, 0))
        monkeypatch.setattr(module, "shared_limit", lambda device: 1 << 18)


def filled(
    text: str, lengths: list[int], new: int = 1, heads: int = 4, kv_heads: int = 1, dim: int = 64, dtype=torch.bfloat16
) -> tuple[LayerCache, Step]:
    """A cache with sequences of the given lengths, and a step of new tokens for it."""
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype}
    past, step = (random_step(len(lengths), n, **shape) for n in (max(lengths), new))
    past, step = (Step(s.query.to(DEVICE), s.keys.to(DEVICE), s.values.to(DEVICE)) for s in (past, step))
    real = torch.arange(max(lengths), device=DEVICE) >= max(lengths) - torch.tensor(lengths, device=DEVICE)[:, None]
    cache = layer_cache(MixKVQConfig.parse(text), past)
    cache.append(Step(past.query, past.keys, past.values, real))
    return cache, step


def check(cache: LayerCache, step: Step, tolerance: float = 3e-3, **options) -> None:
    """The kernel's result against softmax attention over the dequantized cache."""
    tensors, dim = cache_tensors(cache), step.query.shape[3]
    assert decode.unsupported(step.query, tensors) is None
    output = decode.decode_attention(step.query, step.keys, step.values, tensors, scaling=dim**-0.5, **options)
    exact = Step(step.query.float(), step.keys.float(), step.values.float())
    for row in range(output.shape[0]):
        expected = oracle(cache, exact, row, scaling=dim**-0.5, **options)
        error = (output[row].float() - expected).norm() / expected.norm()
        assert error < tolerance, f"sequence {row}: {error}"


@pytest.mark.parametrize("text", SERVED)
def test_it_equals_the_reference(text: str):
    check(*filled(text, [700, 300, 3, 0, 140]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (8, 1), (16, 1), (8, 8)])
def test_heads(heads: int, kv_heads: int):
    check(*filled("default", [400, 131], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("dim", [96, 128, 256])
@pytest.mark.parametrize(
    "text", ["default", "kivi-4", "kivi-2:key_bits=8,value_bits=3", "kivi-2:key_bits=3,value_bits=8"]
)
def test_head_dimensions(text: str, dim: int):
    check(*filled(text, [300], dim=dim, heads=3))


@pytest.mark.parametrize("new", [2, 8])
def test_several_new_tokens(new: int):
    check(*filled("default", [300, 0, 5], new=new, heads=8, kv_heads=2))


def test_float16():
    check(*filled("paper:tau_bf16=2.2,tau_uint4=1.2", [300, 700], dtype=torch.float16), tolerance=1e-3)


def test_soft_cap_and_model_sinks():
    sinks = torch.randn(4, device=DEVICE) * 3
    check(*filled("default", [300, 900]), softcap=5.0)
    check(*filled("default", [300, 900], new=3), sinks=sinks)


def test_many_parts():
    check(*filled("default", [9000, 20], kv_heads=2, heads=4))


def test_more_pages_of_a_warp_than_it_has_lanes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "MAX_PARTS", 2)
    decode.kernel_macros.cache_clear()
    try:
        check(*filled("paper:tau_bf16=2.2,tau_uint4=1.2", [18000, 20]))
    finally:
        decode.kernel_macros.cache_clear()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_extreme_scales(scale: float):
    cache, step = filled("default", [600])
    past = random_step(1, 600, heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16)
    cache = layer_cache(cache.config, Step(*(x.to(DEVICE) for x in (past.query, past.keys, past.values))))
    cache.append(Step(past.query.to(DEVICE) / scale, past.keys.to(DEVICE) * scale, past.values.to(DEVICE) * scale))
    check(cache, Step(step.query / scale, step.keys * scale, step.values * scale))


def test_it_appends_gathers_statistics_and_leaves_its_counters_at_zero():
    cache, step = filled("default", [300, 5], new=3, heads=8, kv_heads=2)
    tensors = cache_tensors(cache)
    before = tensors.dense_keys.clone(), tensors.dense_values.clone()
    seen = QueryStatistics(2, 2, 64, torch.device(DEVICE), sample_dtype=step.query.dtype)
    total, count, samples = (x.clone() for x in seen.tensors())
    for _ in range(2):
        seen.update(step.query)
        seen.sample(step.query, tensors.lengths)
        decode.decode_attention(
            step.query,
            step.keys,
            step.values,
            tensors,
            scaling=0.1,
            append=True,
            statistics=QueryStatistics.of(total, count, samples),
        )
    assert torch.allclose(total, seen.total, rtol=1e-5)
    assert torch.equal(count, seen.count)
    assert samples.any()
    assert torch.equal(samples, seen.samples)
    for old, now, new in zip(before, (tensors.dense_keys, tensors.dense_values), (step.keys, step.values), strict=True):
        for row, slot in enumerate((4 + (300 - 4) % 128, 5)):
            assert torch.equal(now[row, :, slot : slot + 3], new[row])
            now[row, :, slot : slot + 3] = old[row, :, slot : slot + 3]
        assert torch.equal(now.nan_to_num(7), old.nan_to_num(7))
    assert not any(counters.any() for counters in tickets._TICKETS.values())


@pytest.mark.parametrize("where", ["keys", "values"])
def test_a_sequence_with_nan_leaves_the_others_alone(where: str):
    torch.manual_seed(3)
    clean, step = filled("default", [300, 300])
    torch.manual_seed(3)
    past = random_step(2, 300, heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16)
    getattr(past, where)[1, :, 50:] = torch.nan
    spoiled = layer_cache(clean.config, Step(*(x.to(DEVICE) for x in (past.query, past.keys, past.values))))
    spoiled.append(Step(*(x.to(DEVICE) for x in (past.query, past.keys, past.values))))
    arguments = step.query, step.keys, step.values
    first, second = (
        decode.decode_attention(*arguments, cache_tensors(cache), scaling=0.125) for cache in (clean, spoiled)
    )
    assert torch.equal(first[0], second[0])


def test_strided_inputs():
    cache, step = filled("default", [300], heads=8, kv_heads=2)
    spread = Step(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (step.query, step.keys, step.values)))
    check(cache, spread)


def test_inputs_that_begin_between_two_vectors():
    cache, step = filled("default", [300])
    tensors = (step.query, step.keys, step.values)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in tensors]
    assert all(x.is_contiguous() and x.data_ptr() % 16 for x in shifted)
    check(cache, Step(*shifted))


def test_new_tokens_of_another_type_than_the_stored_ones():
    cache, step = filled("default", [300])
    tensors = cache_tensors(cache)
    expected = decode.decode_attention(step.query, step.keys, step.values, tensors, scaling=0.1)
    output = decode.decode_attention(step.query, step.keys.float(), step.values.float(), tensors, scaling=0.1)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("text", ["default:sinks=600", "kivi-4:value_group=64", "paper:tau_bf16=2.2,tau_uint4=1.2"])
@pytest.mark.parametrize(("dim", "heads"), [(64, 4), (96, 8), (256, 8)])
def test_shared_memory_is_known_in_advance(text: str, dim: int, heads: int):
    cache, step = filled(text, [1], dim=dim, heads=heads)
    tensors, row_tiles = cache_tensors(cache), heads // 4
    kernel = decode._kernel(tensors, step.query.dtype, False, row_tiles)
    assert kernel.shared_bytes == decode.shared_bytes(tensors.layout, tensors.sinks, row_tiles)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("default:value_bits=16", {}, "widths other than 2, 3, 4, 8 bits"),
        ("default", {"dim": 80}, "head dimension 80"),
        ("default", {"dtype": torch.float32}, "float32"),
        ("kivi-2:residual_length=64", {}, "pages of 64"),
        ("default:scale_dtype=bfloat16", {}, "scales"),
    ],
)
def test_what_it_leaves_to_triton(text: str, options: dict, reason: str):
    cache, step = filled(text, [300], **options)
    assert reason in (decode.unsupported(step.query, cache_tensors(cache)) or "")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("decode.has_bindings", False, "cuda-bindings"),
        ("module.capability", (7, 5), "compute capability 7.5"),
        ("module.shared_limit", 48 << 10, "bytes of shared memory"),
    ],
)
def test_devices_that_it_leaves_to_triton(name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"mixkvq.kernels.cuda.{name}", lambda *_: value)
    monkeypatch.setattr(decode, "_unsupported", decode._unsupported.__wrapped__)
    cache, step = filled("paper:tau_bf16=2.2,tau_uint4=1.2", [3], dim=128, heads=8)
    assert reason in (decode.unsupported(step.query, cache_tensors(cache)) or "")
