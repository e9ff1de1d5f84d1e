"""A layer's cache in surroundings that change how torch behaves."""

import copy
import sys
import warnings

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.layers import LayerCache, Step
from mixkvq.policies.kivi import KIVI


def test_no_gradient_graph_is_kept():
    step = random_step(1, 300)
    step = Step(*(x.requires_grad_() for x in (step.query, step.keys, step.values)))
    cache = layer_cache(MixKVQConfig.preset("default"), step)
    cache.append(step)
    cache.append(step.tokens(0, 1))
    assert not any(tensor.requires_grad for tensor in (*cache.store.tensors(), cache.statistics.total))
    assert not cache.attend(step.tokens(0, 1), None, scaling=1.0).requires_grad
    copy.deepcopy(cache)


def test_caches_made_in_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        step = random_step(2, 300)
        cache = layer_cache(MixKVQConfig.preset("default"), step)
        cache.append(step)
    cache.crop([150, 3])
    cache.append(random_step(2, 1))
    assert cache.store.lengths == [151, 298]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_default_types_change_nothing(dtype: torch.dtype):
    past, step = random_step(1, 300), random_step(1, 1)

    def attended() -> torch.Tensor:
        cache = layer_cache(MixKVQConfig.preset("default"), past)
        cache.append(past)
        return cache.attend(step, None, scaling=0.25)

    expected = attended()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attended(), expected)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(attended(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_was_cropped_cannot_come_back_as_nan():
    past, step = random_step(2, 200), random_step(2, 1)
    past = Step(past.query, past.keys, past.values, torch.arange(200) >= torch.tensor([40, 0])[:, None])
    clean = layer_cache(MixKVQConfig.preset("kivi-2"), past)
    clean.append(past.tokens(0, 199))
    past.keys[0, :, -1] = past.values[0, :, -1] = float("nan")
    cache = layer_cache(MixKVQConfig.preset("kivi-2"), past)
    cache.append(past)
    cache.crop([1, 1])
    assert torch.allclose(cache.attend(step, None, scaling=0.2), clean.attend(step, None, scaling=0.2), atol=1e-6)


def test_huge_keys_stay_finite():
    step = random_step(1, 300)
    step.keys[..., 2] *= 3e5
    cache = layer_cache(MixKVQConfig.preset("default"), step)
    cache.append(step)
    assert cache.attend(random_step(1, 1), None, scaling=1e-6).isfinite().all()


class Wrong(KIVI):
    """Plans widths that the configuration has no place for."""

    def plan(self, block):
        return super().plan(block) + 1


def test_a_plan_of_unknown_widths_is_refused():
    config, step = MixKVQConfig.preset("kivi-2"), random_step(1, 128)
    cache = LayerCache(config, Wrong(config), step)
    with pytest.raises(ValueError, match=r"The policy Wrong planned .* the widths \[3\]; .* of the widths \[2\]"):
        cache.append(step)


def test_no_rows_left():
    step = random_step(2, 300)
    cache = layer_cache(MixKVQConfig.preset("default"), step)
    cache.append(step)
    cache.select([])
    assert cache.store.lengths == []
    assert cache.store.pages.used == 0


def warned(text: str, device: str) -> list[str]:
    """What two layers of a cache say when they are put on a device."""
    cache = layer_cache(MixKVQConfig.parse(text), random_step(1, 2))
    with warnings.catch_warnings(record=True, action="default") as caught:
        for _ in range(2):
            cache.recipe.warn_of_torch(torch.device(device))
    return [str(warning.message) for warning in caught]


def test_a_gpu_without_triton_is_warned_about_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    (message,) = warned("default", "cuda")
    assert 'pip install "mixkvq[kernels]"' in message
    (message,) = warned("rotatekv-2", "cuda")  # Triton would not help
    assert message.startswith("No GPU kernel serves this cache")
    assert not warned("default", "cpu")


def test_a_gpu_with_triton_is_not_warned_about():
    pytest.importorskip("triton")
    assert not warned("default", "cuda")
