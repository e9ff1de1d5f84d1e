"""Every architecture by its real class: the bf16 cache gives the stock cache's tokens, quantized ones stay close."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from mixkvq import MixKVQCache
from mixkvq.models import attention
from models import ARCHITECTURES, VOCABULARY, tiny_model

PADS = (0, 41)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def left_padded(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (len(PADS), length))
    mask = (torch.arange(length) >= torch.tensor(PADS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def continued(model: PreTrainedModel, inputs: dict, cache, implementation: str, new: int = 40) -> tuple:
    with attention(model, implementation):
        out = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("length", [60, 230])
def test_bf16_gives_the_stock_tokens(model: PreTrainedModel, length: int):
    inputs = left_padded(length)
    expected, logits = continued(model, inputs, DynamicCache(config=model.config), "eager", new=60)
    cache = MixKVQCache(model.config, "bf16:residual_length=64")
    tokens, ours = continued(model, inputs, cache, "mixkvq", new=60)
    assert torch.equal(tokens, expected)
    assert torch.allclose(ours, logits, atol=2e-4, rtol=1e-3)
    assert cache.memory().packed_keys > 0
    assert cache.get_seq_length() == length + 59


def test_quantized_caches_stay_near(model: PreTrainedModel):
    ids = torch.randint(3, VOCABULARY, (2, 400))
    kl = {}
    with torch.inference_mode(), attention(model, "mixkvq"):
        for name in ("bf16", "kivi-2", "kivi-4", "default", "paper:tau_uint4=0.5,tau_bf16=1.2"):
            cache = MixKVQCache(model.config, name)
            parts = [model(ids[:, i : i + 100], past_key_values=cache).logits for i in range(0, 400, 100)]
            logits = torch.cat(parts, 1).log_softmax(-1)
            if name == "bf16":
                exact, held = logits, cache.memory().total
            kl[name] = (exact.exp() * (exact - logits)).sum(-1).mean().item()
            assert cache.memory().total <= held
    assert kl.pop("bf16") == 0
    assert kl["kivi-4"] < 0.3 * kl["kivi-2"]
    assert all(0 < other < kl["kivi-2"] for name, other in kl.items() if name != "kivi-2")


def test_a_batch_row_equals_the_row_alone(model: PreTrainedModel):
    """Padding is never stored: a sequence's packed cache, and so its tokens, do not depend on its batch."""
    inputs = left_padded(300)
    together, logits = continued(model, inputs, MixKVQCache(model.config, "default"), "mixkvq", new=12)
    for row, pad in enumerate(PADS):
        one = {name: tensor[row : row + 1, pad:] for name, tensor in inputs.items()}
        alone, alone_logits = continued(model, one, MixKVQCache(model.config, "default"), "mixkvq", new=12)
        assert torch.allclose(logits[row], alone_logits[0], atol=1e-3)
        assert torch.equal(together[row, pad:], alone[0])
