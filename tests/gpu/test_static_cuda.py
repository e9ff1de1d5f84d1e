"""The cache of a fixed size on a GPU: no waiting for the device, and the same tokens from CUDA graphs."""

import pytest
import torch

from conftest import random_step
from mixkvq import MixKVQCache, MixKVQConfig, MixKVQStaticCache
from mixkvq.layers import ModelCache, Step
from mixkvq.models import attention
from mixkvq.policies import policy_class
from mixkvq.store.shape import Capacity
from models import VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYERS = 3
PRESETS = [
    "default:residual_length=32,key_group=32",
    "default:key_feedback=0.2,residual_length=32,key_group=32",
    "kivi-2",
    "kitty",
    "bf16",
    "paper:tau_uint4=1.2,tau_bf16=2.2",
]


def steps(batch: int, length: int, device: str) -> list[Step]:
    parts = [random_step(batch, length, dtype=torch.float32) for _ in range(LAYERS)]
    return [Step(*(x.to(device) for x in (part.query, part.keys, part.values))) for part in parts]


def store_prompt(cache: ModelCache, layers: list[Step]) -> None:
    cache.allocate(layers[0].keys, layers[0].values)
    cache.begin(layers[0])
    for layer, step in enumerate(layers):
        cache.append(layer, step)


@pytest.mark.parametrize("text", PRESETS)
def test_steps_do_not_wait_and_give_what_the_cpu_gives(text: str):
    config = MixKVQConfig.parse(text)
    policy = policy_class(config.policy)(config)
    outputs = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        capacity = Capacity(max_tokens=60 * config.residual_length, promoted_share=1.0)
        cache = ModelCache(config, policy, LAYERS, capacity)
        store_prompt(cache, steps(3, 300, device))
        passes = [steps(3, length, device) for length in (1, 1, 7, 8, 2, *[8] * 20, *[1] * 40)]
        if device == "cuda":
            for layer, step in enumerate(steps(3, 8, device)):  # compiles
                cache.decode(layer, step, scaling=0.25)
            cache = ModelCache(config, policy, LAYERS, capacity)
            torch.manual_seed(0)
            store_prompt(cache, steps(3, 300, device))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            last = [[cache.decode(i, step, scaling=0.25) for i, step in enumerate(layers)] for layers in passes][-1]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        cache.check()
        outputs.append((cache.store.books.lengths.cpu(), [output.cpu() for output in last]))
    (lengths, cpu), (other, gpu) = outputs
    assert torch.equal(lengths, other)
    for a, b in zip(cpu, gpu, strict=True):
        assert (a - b).abs().median() < 1e-3
        assert (a - b).abs().max() < 0.3


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
def test_graphs_give_the_tokens_of_plain_steps(architecture: str):
    model = tiny_model(architecture).cuda()
    try:
        for turn in range(3):  # a new cache must not replay the graph of an old one
            ids = torch.randint(3, VOCABULARY, (2, 300), device="cuda")
            mask = torch.ones_like(ids)
            mask[1, :70] = 0
            options = {"attention_mask": mask, "max_new_tokens": 200, "do_sample": False, "eos_token_id": None}
            tokens = []
            with attention(model, "mixkvq"):
                growing = MixKVQCache(model.config, "default")
                tokens.append(model.generate(ids, past_key_values=growing, **options))
                for plain in (True, False):
                    static = MixKVQStaticCache(model.config, "default", max_tokens=4096)
                    tokens.append(model.generate(ids, past_key_values=static, disable_compile=plain, **options))
                    assert static.memory().packed_keys == growing.memory().packed_keys
                static.reset()
                tokens.append(model.generate(ids, past_key_values=static, **options))
            assert all(torch.equal(tokens[0], other) for other in tokens[1:]), turn
    finally:
        model.cpu()
        torch._dynamo.reset()


def test_a_captured_step_can_be_replayed():
    config = MixKVQConfig.preset("default")
    torch.manual_seed(0)
    layers = steps(2, 500, "cuda")
    caches = [
        ModelCache(config, policy_class(config.policy)(config), LAYERS, Capacity(max_tokens=4096)) for _ in range(2)
    ]
    for cache in caches:
        store_prompt(cache, layers)
    plain, replayed = caches
    token = steps(2, 1, "cuda")

    def step(cache: ModelCache) -> list[torch.Tensor]:
        return [cache.decode(layer, part, scaling=0.25) for layer, part in enumerate(token)]

    step(plain), step(replayed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(replayed)
    for _ in range(300):
        for part, fresh in zip(token, steps(2, 1, "cuda"), strict=True):
            for name in ("query", "keys", "values"):
                getattr(part, name).copy_(getattr(fresh, name))
        expected = step(plain)
        graph.replay()
        for a, b in zip(outputs, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(plain.store.books.lengths, replayed.store.books.lengths)
    assert plain.store.books.lengths.tolist() == [801, 801]
