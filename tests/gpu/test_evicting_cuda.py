"""Caches that evict, on a GPU: the same as on the CPU, and evicted bytes are given back."""

import pytest
import torch

from conftest import random_step
from mixkvq import MixKVQCache, MixKVQConfig, confidence_processors
from mixkvq.layers import EvictingCache, Step
from mixkvq.models import attention
from mixkvq.policies import policy_class
from models import VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = "conf-kv:keep=64,keep_confident=48,protected=8,residual_length=16,key_group=8"


def test_the_gpu_gives_what_the_cpu_gives():
    config = MixKVQConfig.parse(CONFIG)
    steps = [random_step(2, length) for length in (200, 1, 1, 5, 1)]
    outputs = []
    for device in ("cpu", "cuda"):
        cache, found = None, []
        for step in steps:
            placed = Step(*(x.to(device) for x in (step.query, step.keys, step.values)))
            cache = cache or EvictingCache(config, policy_class("conf-kv")(config), placed)
            found.append(cache.attend(placed, None, scaling=0.25).cpu())
            cache.append(placed)
            cache.observe([[0.9] * step.length, [0.1] * step.length])
        assert cache is not None
        assert cache.store.lengths == [48, 64]
        assert all(tensor.device.type == device for tensor in cache.store.tensors())
        outputs.append(torch.cat(found, 2))
    assert (outputs[0] - outputs[1]).abs().median() < 1e-5


@pytest.mark.parametrize("text", [CONFIG, "window-512:keep=64"])
def test_generation_holds_no_more_than_it_says(text: str):
    model = tiny_model("llama").cuda()
    try:
        cache = MixKVQCache(model.config, text)
        ids = torch.randint(3, VOCABULARY, (2, 500), device="cuda")
        options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 40}
        with attention(model, "mixkvq"):
            out = model.generate(ids, past_key_values=cache, logits_processor=confidence_processors(cache), **options)
        assert out.shape == (2, 540)
        report, tensors = cache.memory(), [t for layer in cache.layers for t in layer.cache.store.tensors()]
        assert report.total == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert max(length for layer in cache.layers for length in layer.cache.store.lengths) <= 64
    finally:
        model.cpu()
