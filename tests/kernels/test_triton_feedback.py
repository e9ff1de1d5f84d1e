"""The Triton kernel moves keys to where the reference rounds them from. Runs on a GPU, or interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from mixkvq import MixKVQConfig
from mixkvq.kernels.triton import available
from mixkvq.kernels.triton.feedback import move_keys
from mixkvq.layers.recipe import Recipe
from mixkvq.policies import policy_class
from mixkvq.quant.block import quantize_keys
from mixkvq.quant.salience import QueryStatistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="takes minutes when it is interpreted")
pytestmark = pytest.mark.skipif(not available(DEVICE), reason="Triton needs a GPU or TRITON_INTERPRET=1")


def dequantized(keys: torch.Tensor, bits: torch.Tensor, config: MixKVQConfig, feedback=None) -> torch.Tensor:
    q = quantize_keys(
        keys,
        bits,
        group=config.key_group,
        clip=config.key_clip,
        unbiased=config.key_unbiased,
        param_dtype=config.param_dtype,
        feedback=feedback,
    )
    scale, zero = (x.repeat_interleave(config.key_group, 2) for x in (q.scale, q.zero))
    return torch.where((bits == 16)[:, :, None], keys.float(), q.codes * scale + zero)


def logit_error(keys: torch.Tensor, other: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """``[N, Hkv]``: what queries of that covariance make of the keys' errors, summed over the tokens."""
    error = keys - other
    return torch.einsum("nhtd,nhde,nhte->nh", error, covariance, error)


@pytest.mark.parametrize(
    ("text", "dim", "tokens", "dtype"),
    [
        ("default:key_feedback=0.2,residual_length=32,key_group=32", 16, 50, torch.float32),
        ("default:key_feedback=0.5,residual_length=32,key_group=16", 24, 300, torch.bfloat16),
        ("kivi-2:key_feedback=0.1,residual_length=16,key_group=16", 20, 20, torch.float16),
        ("paper:key_feedback=0.2,tau_bf16=2.2,tau_uint4=1.2,residual_length=32", 16, 50, torch.bfloat16),
        ("default:key_feedback=0.2", 64, 150, torch.bfloat16),
        ("kivi-2:key_feedback=0.2,residual_length=16,key_group=16", 144, 400, torch.float32),
        pytest.param("default:key_feedback=0.2", 256, 900, torch.bfloat16, marks=NEEDS_GPU),
    ],
)
def test_it_moves_keys_to_where_the_reference_rounds_them_from(text: str, dim: int, tokens: int, dtype: torch.dtype):
    config = MixKVQConfig.parse(text)
    heads, size = 2, config.residual_length
    keys = torch.randn(3, heads, 2 * size + 9, dim) * torch.logspace(-1, 0.7, dim) + torch.randn(dim)
    keys = keys.to(dtype).to(DEVICE)
    recipe = Recipe.of(config, policy_class(config.policy)(config), heads, dim, dim, dtype)
    statistics = QueryStatistics(3, heads, dim, DEVICE, sample_dtype=dtype)
    queries = torch.randn(3, 2 * heads, tokens, dim, device=DEVICE) @ torch.randn(dim, dim, device=DEVICE)
    statistics.update(queries.to(dtype))
    statistics.sample(queries.to(dtype), torch.tensor([0, 30, 7], device=DEVICE))
    statistics = statistics.with_prompt(queries.to(dtype))
    rows, starts = [1, 0, 1, 2], [9, 0, size + 9, 3]
    blocks = torch.stack([keys[r, :, s : s + size] for r, s in zip(rows, starts, strict=True)])
    of_blocks = statistics.rows(torch.tensor(rows, device=DEVICE))
    bits = recipe.plan(blocks, of_blocks)
    expected = dequantized(blocks, bits, config, recipe.feedback(blocks, bits, of_blocks))

    before = keys.clone()
    integers = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, starts, [1, 1, 1, 0])]
    move_keys(
        keys,
        *integers,
        bits,
        statistics.samples,
        recipe.layout,
        damping=config.key_feedback,
        key_clip=config.key_clip,
        key_unbiased=config.key_unbiased,
    )
    moved = torch.stack([keys[r, :, s : s + size] for r, s in zip(rows, starts, strict=True)])
    written = dequantized(moved, bits, config)
    exact = (bits == 16)[:, :, None].expand_as(moved)
    assert torch.equal(moved[exact], blocks[exact])
    assert torch.equal(keys[2], before[2])  # not active
    covariance = of_blocks.covariance()[:3]
    ours, theirs, unmoved = (
        logit_error(blocks[:3].float(), x[:3], covariance)
        for x in (written, expected, dequantized(blocks, bits, config))
    )
    assert (ours < 0.95 * unmoved).float().mean() > 0.8
    assert torch.allclose(ours, theirs, rtol=0.1)
    if dtype == torch.float32:
        # In 16 bits the moved keys are so coarse that many codes fall to either side.
        differ = (expected[:3] - written[:3]).abs() > 0.1 * (expected - blocks.float()).abs().mean()
        assert differ.float().mean() < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_queries_that_are_not_finite_move_nothing(bad: float):
    config = MixKVQConfig.parse("default:key_feedback=0.2,residual_length=16,key_group=16")
    recipe = Recipe.of(config, policy_class(config.policy)(config), 1, 16, 16, torch.float32)
    keys = torch.randn(1, 1, 16, 16, device=DEVICE)
    samples = torch.randn(1, 1, 32, 16, device=DEVICE)
    samples[..., 20, 2] = bad
    before, one = keys.clone(), torch.ones(1, dtype=torch.int32, device=DEVICE)
    bits = torch.full((1, 1, 16), 2, dtype=torch.uint8, device=DEVICE)
    options = {"damping": 0.2, "key_clip": True, "key_unbiased": True}
    move_keys(keys, one - 1, one - 1, one, bits, samples, recipe.layout, **options)
    assert torch.equal(keys, before)
