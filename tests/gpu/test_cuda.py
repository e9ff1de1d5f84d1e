"""On a GPU: the same results as on the CPU, no tensor left behind, bytes as the allocator counts them."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.layers import Step
from mixkvq.models import attention
from models import VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def to_gpu(step: Step) -> Step:
    real = None if step.real is None else step.real.cuda()
    return Step(step.query.cuda(), step.keys.cuda(), step.values.cuda(), real)


def check_alike(config: MixKVQConfig) -> None:
    """A layer's cache on the GPU against one on the CPU."""
    past, step, more = random_step(3, 900), random_step(4, 3), random_step(4, 1)
    past = Step(past.query, past.keys, past.values, torch.arange(900) >= torch.tensor([0, 200, 899])[:, None])
    outputs = []
    for place in (lambda x: x, to_gpu):
        cache = layer_cache(config, place(past))
        cache.append(place(past))
        cache.select([2, 0, 1, 1])
        output = [cache.attend(place(step), None, scaling=0.25)]
        cache.append(place(more))
        cache.crop([0, 300, 2, 0])
        output.append(cache.attend(place(step), None, scaling=0.25))
        outputs.append([part.cpu() for part in output])
        assert all(tensor.device == output[0].device for tensor in cache.store.tensors())
    for cpu, gpu in zip(*outputs, strict=True):
        # A code that rounds to the other side on a GPU moves an output a little; most must not move at all.
        assert (cpu - gpu).abs().median() < 1e-5
        assert (cpu - gpu).abs().max() < 0.3


def test_the_gpu_gives_what_the_cpu_gives(config: MixKVQConfig):
    check_alike(config)


def test_frozen_channels_are_those_of_the_cpu():
    fields = {"policy": "frozen", "budget": None, "channels": [[0, 3, 7], [5]]}
    check_alike(MixKVQConfig.preset("default", **fields))
    check_alike(MixKVQConfig.preset("default", **fields, key_feedback=None, key_group=32))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss", "qwen3-moe"])
def test_generation_on_the_gpu(architecture: str):
    model = tiny_model(architecture).cuda()
    try:
        ids = torch.randint(3, VOCABULARY, (2, 300), device="cuda")
        mask = torch.ones_like(ids)
        mask[1, :70] = 0
        arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
        with attention(model, "eager"):
            expected = model.generate(ids, **arguments)
        with attention(model, "mixkvq"):
            exact = MixKVQCache(model.config, "bf16:residual_length=64")
            assert torch.equal(model.generate(ids, past_key_values=exact, **arguments), expected)
            for options in ({"num_beams": 3}, {}):
                cache = MixKVQCache(model.config, "default")
                out = model.generate(ids, past_key_values=cache, **arguments, **options)
                assert out.shape == (2, 340)
    finally:
        model.cpu()


def requested() -> int:
    """Bytes of live tensors, without what the allocator adds to reuse its blocks."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("preset", ["default", "kivi-2", "paper:tau_uint4=1.5,tau_bf16=4"])
def test_the_allocator_holds_what_memory_reports(preset: str):
    step = to_gpu(random_step(2, 128 * 200 + 30, heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16))
    config = MixKVQConfig.parse(preset)
    layer_cache(config, step).append(step)  # what libraries and kernels keep once for all caches is taken now
    torch.cuda.synchronize()
    before = requested()
    cache = layer_cache(config, step)
    cache.append(step)
    held = requested() - before
    reported = cache.memory().total
    assert held == reported
    assert cache.memory().parts["spare"] < 0.04 * reported
    if preset == "default":
        assert reported < cache.memory().bf16 / 5
