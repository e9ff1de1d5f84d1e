"""The statically shaped cache holds what the growing one holds, and never more than it was given room for."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import LayerCache, ModelCache, Step
from mixkvq.policies import policy_class
from mixkvq.quant.rope import Rope
from mixkvq.store.books import Books, CacheFullError, steps_left
from mixkvq.store.memory import PACKED_PARTS
from mixkvq.store.shape import Capacity
from mixkvq.store.view import PackedPages

LAYERS = 2


def model_cache(config: MixKVQConfig, **capacity) -> ModelCache:
    capacity = capacity or {"max_tokens": 20 * config.residual_length}
    return ModelCache(config, policy_class(config.policy)(config), LAYERS, Capacity(**capacity), Rope.of_base(16))


def steps(batch: int, length: int, **shape: int) -> list[Step]:
    return [random_step(batch, length, **shape) for _ in range(LAYERS)]


def prompt(cache: ModelCache, layers: list[Step]) -> list[torch.Tensor]:
    """A forward pass of any number of tokens: the attention outputs of all layers."""
    outputs = []
    cache.begin(layers[0])
    for layer, step in enumerate(layers):
        outputs.append(cache.attend(layer, step, None, scaling=0.25))
        cache.append(layer, step)
    return outputs


def take(cache: ModelCache, layers: list[Step]) -> list[torch.Tensor]:
    """A forward pass, by the way that the adapter would take."""
    first = layers[0]
    if not cache.ready:
        cache.allocate(first.keys, first.values)
    elif first.length <= 8 and first.real is None:
        return [cache.decode(layer, step, scaling=0.25) for layer, step in enumerate(layers)]
    return prompt(cache, layers)


def take_all(caches: list[LayerCache], layers: list[Step]) -> list[torch.Tensor]:
    outputs = []
    for cache, step in zip(caches, layers, strict=True):
        outputs.append(cache.attend(step, None, scaling=0.25))
        cache.append(step)
    return outputs


def assert_same(cache: ModelCache, caches: list[LayerCache]) -> None:
    """The same tokens in the same pages, in every layer."""
    cache.check()
    for layer, other in enumerate(caches):
        ours, theirs = cache.store.tensors(layer), other.tensors()
        assert torch.equal(ours.lengths, theirs.lengths)
        blocks, filled = ours.places()
        for row in range(len(blocks)):
            end = int(filled[row])
            assert torch.equal(ours.dense_keys[row, :, :end], theirs.dense_keys[row, :, :end])
            assert torch.equal(ours.dense_values[row, :, :end], theirs.dense_values[row, :, :end])
            if blocks[row]:
                a = dequantize_pages(PackedPages.of_cache(ours), row, rotated=ours.rotated)
                b = dequantize_pages(PackedPages.of_cache(theirs), row, rotated=ours.rotated)
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[1], b[1])


def padded(layers: list[Step], pads: list[int]) -> list[Step]:
    real = torch.arange(layers[0].length) >= torch.tensor(pads)[:, None]
    return [Step(step.query, step.keys, step.values, real) for step in layers]


def test_it_holds_what_the_growing_cache_holds(static_config: MixKVQConfig):
    size, sinks = static_config.residual_length, static_config.sinks
    cache = model_cache(static_config, max_tokens=20 * size, promoted_share=1.0)
    passes = [
        padded(steps(3, sinks + 2 * size + 5), [0, 30, sinks + 2 * size + 4]),
        steps(3, 1),
        steps(3, 7),
        padded(steps(3, size), [0, size - 1, 3]),
        padded(steps(3, 5), [0, 5, 2]),
        *(steps(3, length) for length in (8, 3, 2, 8, 6)),
        *(steps(3, 1) for _ in range(40)),
        *(steps(3, 8) for _ in range(size // 8)),
        steps(3, size + 9),
    ]
    caches = [layer_cache(static_config, step) for step in passes[0]]
    for layers in passes:
        ours, theirs = take(cache, layers), take_all(caches, layers)
        real = layers[0].real
        for a, b in zip(ours, theirs, strict=True):
            a, b = (x if real is None else x.transpose(1, 2)[real] for x in (a, b))
            assert torch.allclose(a, b, atol=1e-5)
    assert_same(cache, caches)


@pytest.mark.parametrize(
    "text",
    [
        "default:residual_length=16,key_group=16",
        "default:key_feedback=0.2,residual_length=16,key_group=16",
        pytest.param("paper:tau_bf16=2.2,tau_uint4=1.2,residual_length=32", marks=pytest.mark.slow),
    ],
)
def test_kernels_fill_it_as_torch_does(text: str, monkeypatch: pytest.MonkeyPatch):
    config = MixKVQConfig.parse(text)
    size = config.residual_length
    passes = [padded(steps(2, size + 7), [0, 12]), padded(steps(2, size), [7, 0]), steps(2, 1), steps(2, 8)]
    stores = []
    for kernels in (False, True):
        for module in ("mixkvq.layers.flush", "mixkvq.layers.recipe", "mixkvq.kernels.decode"):
            monkeypatch.setattr(f"{module}.has_kernels", lambda device, on=kernels: on)
        cache = model_cache(config, max_tokens=8 * size, promoted_share=1.0)
        outputs = [take(cache, layers) for layers in passes]
        stores.append((cache.store, outputs[-1]))
    (one, expected), (other, got) = stores
    for name in ("lengths", "table", "next_page", "overflow"):
        assert torch.equal(getattr(one.books, name), getattr(other.books, name))
    for a, b in zip(expected, got, strict=True):
        assert (a - b).abs().median() < 1e-5  # a code that rounds to the other side moves an output a little
        assert (a - b).abs().max() < 0.1


# Room


@pytest.mark.parametrize("lengths", [[3], [200, 90, 131], [0, 1]])
@pytest.mark.parametrize("free", [0, 1, 5])
def test_steps_left_are_the_steps_that_fit(lengths: list[int], free: int):
    left = steps_left(lengths, free, sinks=4, tokens=32)
    books = Books(len(lengths), 50, 4, 32, torch.device("cpu"))
    books.lengths += torch.tensor(lengths).int()
    books.next_page += 50 - free
    for _ in range(left):
        books.advance(1)
    assert books.overflow.item() == 0
    books.advance(1)
    assert books.overflow.item() == 1


def test_a_full_cache_says_so_and_drops_nothing_before(config: MixKVQConfig):
    size = config.residual_length
    cache = model_cache(config, max_tokens=4 * size, promoted_share=1.0)
    take(cache, padded(steps(2, config.sinks + size + 5), [0, 9]))
    while cache.steps >= 8:
        take(cache, steps(2, 8))
    while cache.steps:
        take(cache, steps(2, 1))
    stored = cache.store.books.lengths.clone()
    for length in (1, 8):
        with pytest.raises(
            CacheFullError, match=r"room for 0 more tokens .*, and \d came.* Give it a larger max_tokens"
        ):
            take(cache, steps(2, length))
    cache.check()
    assert torch.equal(cache.store.books.lengths, stored)


def test_a_graph_that_the_host_does_not_count_drops_what_does_not_fit():
    cache = model_cache(MixKVQConfig.parse("default:residual_length=32,key_group=32"), max_tokens=64)
    take(cache, steps(2, 40))
    cache.steps = 10**6  # as if a CUDA graph had been replayed
    for _ in range(12):
        take(cache, steps(2, 8))
    assert cache.store.books.next_page.item() == 2
    assert (cache.store.books.lengths <= 4 + 32 + 31).all()
    for use in (cache.check, cache.memory, lambda: cache.begin(steps(2, 40)[0])):
        with pytest.raises(CacheFullError, match="tokens that came after it was full were dropped"):
            use()
    cache.reset()
    take(cache, steps(2, 40))
    cache.check()


def test_a_prompt_that_does_not_fit_changes_nothing():
    config = MixKVQConfig.preset("default")
    cache = model_cache(config, max_tokens=6 * 128)
    take(cache, steps(2, 300))
    before = cache.store.books.lengths.clone(), cache.memory().parts
    with pytest.raises(CacheFullError, match=r"with the 800 new tokens, 1,280 tokens are to be in pages.* 768 tokens"):
        take(cache, steps(2, 400))
    assert torch.equal(cache.store.books.lengths, before[0])
    assert cache.memory().parts == before[1]
    take(cache, steps(2, 100))


def test_channels_without_room_keep_their_base_width():
    config = MixKVQConfig.parse("paper:tau_bf16=2.2,tau_uint4=1.2")
    cache = model_cache(config, max_tokens=14 * 128, promoted_share=0.1)
    caches = [layer_cache(config, step) for step in steps(2, 1)]
    prompt, more = steps(2, 900), steps(2, 1)
    take(cache, prompt)
    with pytest.warns(UserWarning, match=r"promoted channels of a page found no chunks left .* larger"):
        report = cache.memory()
    take_all(caches, prompt)
    assert 2 < report.key_bits_codes < sum(c.memory().key_bits_codes for c in caches) / 2
    assert all(cache.store.next_chunk[i] <= len(cache.store.chunks[b]) for i, b in enumerate((4, 16)))
    for layer, output in enumerate(take(cache, more)):
        ours = cache.store.tensors(layer)
        exact = caches[layer].attend(more[layer], None, scaling=0.25)
        assert (output - exact).abs().mean() < 0.3
        keys, _ = dequantize_pages(PackedPages.of_cache(ours), 0, rotated=False)
        assert (keys - prompt[layer].keys[0, :, : keys.shape[1]]).abs().mean() < 0.5


def test_chunks_are_measured_on_the_first_prompt():
    config = MixKVQConfig.parse("paper:tau_bf16=2.2,tau_uint4=1.2")
    cache = model_cache(config, max_tokens=40 * 128)
    take(cache, steps(2, 600))
    for at, (bits, data) in enumerate(cache.store.chunks.items()):
        used = cache.store.next_chunk[at].item()
        assert used > 0
        assert 1.2 * used * 40 / 8 < len(data) < 1.3 * used * 40 / 8 + 5
        assert cache.store.layout.chunks[bits].nbytes == data.shape[1]
    addresses = [tensor.data_ptr() for tensor in cache.store.held()]
    take(cache, steps(2, 600))
    assert [tensor.data_ptr() for tensor in cache.store.held()] == addresses
    short = model_cache(config, max_tokens=40 * 128)
    take(short, steps(2, 20))
    assert len(short.store.chunks[16]) == 0.25 * 2 * 16 * 40 * LAYERS


# Bytes


def test_parts_are_those_of_the_growing_cache(static_config: MixKVQConfig):
    layers = steps(2, static_config.sinks + 2 * static_config.residual_length + 3)
    cache, caches = model_cache(static_config), [layer_cache(static_config, step) for step in layers]
    take(cache, layers)
    take_all(caches, layers)
    report, other = cache.memory(), caches[0].memory() + caches[1].memory()
    for part in PACKED_PARTS:
        assert report.parts[part] == other.parts[part]
    assert report.total == sum(tensor.nbytes for tensor in cache.store.held())
    assert report.elements == other.elements
    assert report.bits == other.bits
    assert report.key_bits_codes == other.key_bits_codes


@pytest.mark.parametrize("text", ["default", "kivi-2", "paper"])
def test_max_bytes_is_used_and_kept(text: str):
    config = MixKVQConfig.parse(text)
    cache = model_cache(config, max_bytes=600_000)
    take(cache, steps(2, 30))
    held = sum(tensor.nbytes for tensor in cache.store.held())
    per_page = (held - cache.store.dense_keys.nbytes * 2) / cache.store.books.pages
    assert 600_000 - 1.1 * per_page < held <= 600_000
    with pytest.raises(ValueError, match=r"max_bytes=50,000 is too small: .* one page for each of 2 sequences take \d"):
        take(model_cache(config, max_bytes=50_000), steps(2, 30))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either max_tokens or max_bytes"),
        ({"max_tokens": 1, "max_bytes": 1}, "either max_tokens or max_bytes"),
        ({"max_tokens": 0}, "max_tokens is a whole number of at least 1, not 0"),
        ({"max_tokens": 9, "promoted_share": 1.5}, "promoted_share lies between 0 and 1, not 1.5"),
    ],
)
def test_capacities_that_make_no_sense(given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Capacity(**given)


def test_what_no_kernel_packs_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("mixkvq.layers.recipe.has_kernels", lambda device: True)
    step = random_step(1, 3)
    for text, reason in {
        "kivi-2:residual_length=48,key_group=16": "its residual_length is not a power of two, but 48",
        "kivi-2:key_axis=token": r"its keys have scales per token \(key_axis='token'\)",
    }.items():
        cache = model_cache(MixKVQConfig.parse(text))
        with pytest.raises(ValueError, match=f"None serves this one, as {reason}: change that, or use MixKVQCache"):
            cache.allocate(step.keys, step.values)


# A cache is used again


def test_reset_keeps_the_tensors_and_forgets_the_tokens(static_config: MixKVQConfig):
    cache = model_cache(static_config, max_tokens=10 * static_config.residual_length, promoted_share=1.0)
    take(cache, steps(2, 2 * static_config.residual_length + 20))
    addresses = [tensor.data_ptr() for tensor in cache.store.held()]
    cache.store.dense_values.fill_(float("nan"))
    cache.reset()
    layers, more = padded(steps(2, static_config.residual_length + 40), [0, 11]), steps(2, 1)
    assert not cache.allocate(layers[0].keys, layers[0].values)
    caches = [layer_cache(static_config, step) for step in layers]
    cache_outputs = prompt(cache, layers)
    for a, b in zip(cache_outputs, take_all(caches, layers), strict=True):
        assert torch.allclose(a.transpose(1, 2)[layers[0].real], b.transpose(1, 2)[layers[0].real], atol=1e-5)
    for a, b in zip(take(cache, more), take_all(caches, more), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert_same(cache, caches)
    assert [tensor.data_ptr() for tensor in cache.store.held()] == addresses
    assert cache.allocate(*(torch.zeros(3, 2, 1, 16),) * 2)
    assert cache.store.shape.batch == 3


def test_a_pass_that_was_interrupted():
    cache = model_cache(MixKVQConfig.preset("default"))
    layers = steps(1, 1)
    take(cache, steps(1, 30))
    cache.decode(0, layers[0], scaling=1.0)
    with pytest.raises(ValueError, match="Layer 0 of this cache got tokens when it was the turn of layer 1"):
        cache.decode(0, layers[0], scaling=1.0)
    with pytest.raises(ValueError, match="turn of layer 1"):
        cache.begin(layers[0])


def test_a_batch_of_another_size():
    cache = model_cache(MixKVQConfig.preset("default"))
    take(cache, steps(2, 30))
    with pytest.raises(ValueError, match="holds a batch of 2 and was given one of 3"):
        cache.decode(0, random_step(3, 1), scaling=1.0)


def test_a_sequence_that_is_not_finite_leaves_the_others_alone(config: MixKVQConfig):
    passes = [steps(2, config.sinks + config.residual_length - 3), *(steps(2, 1) for _ in range(5))]
    clean, spoilt = model_cache(config, max_tokens=2048), model_cache(config, max_tokens=2048)
    for layers in passes:
        expected = take(clean, layers)
        layers[0].values[1] = layers[1].keys[1] = float("nan")
        for a, b in zip(take(spoilt, layers), expected, strict=True):
            assert torch.allclose(a[0], b[0], atol=1e-5)
