"""Kernels move keys to where the reference rounds them from. On a GPU, or interpreted and emulated."""

import emulator
import pytest
import torch

from mixkvq import MixKVQConfig
from mixkvq.kernels.cuda import feedback as cuda
from mixkvq.kernels.cuda import module
from mixkvq.layers.recipe import LayerShape, Recipe
from mixkvq.policies import policy_class
from mixkvq.quant.feedback import feedback_parts
from mixkvq.quant.salience import QueryStatistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["triton", "cuda"])
def move_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The kernels, one after the other."""
    if request.param == "triton":
        pytest.importorskip("triton")
        from mixkvq.kernels.triton import available, feedback

        if not available(DEVICE):
            pytest.skip("Triton needs a GPU or TRITON_INTERPRET=1")
        return feedback.move_keys
    if DEVICE.type == "cpu":
        if emulator.COMPILER is None:
            pytest.skip("needs a GPU or g++")
        monkeypatch.setattr(cuda, "load_kernel", emulator.load_kernel)
        monkeypatch.setattr(cuda, "has_bindings", lambda: True)
        monkeypatch.setattr(module, "capability", lambda device: (8, 0))
        monkeypatch.setattr(module, "shared_limit", lambda device: 1 << 18)
    return cuda.move_keys


def dequantized(recipe: Recipe, keys: torch.Tensor, bits: torch.Tensor, statistics=None) -> torch.Tensor:
    """What the reference makes of keys, with feedback if there are statistics."""
    q, _ = recipe.quantize(keys, keys, bits, statistics)
    scale, zero = (x.repeat_interleave(recipe.config.key_group, 2) for x in (q.scale, q.zero))
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
        ("default:key_feedback=0.2", 96, 30, torch.float16),
        ("kivi-4:key_group=64,key_clip=true,key_feedback=0.2", 80, 1000, torch.bfloat16),
        ("paper:key_feedback=0.2,tau_bf16=2.2,tau_uint4=1.2", 64, 50, torch.float16),
        ("default:key_feedback=0.2", 128, 600, torch.bfloat16),
        pytest.param("default:key_feedback=0.2", 256, 900, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_it_moves_keys_to_where_the_reference_rounds_them_from(
    move_keys, text: str, dim: int, tokens: int, dtype: torch.dtype
):
    config = MixKVQConfig.parse(text)
    heads, size = 2, config.residual_length
    keys = torch.randn(3, heads, 2 * size + 9, dim) * torch.logspace(-1, 0.7, dim) + torch.randn(dim)
    keys = keys.to(dtype).to(DEVICE)
    recipe = Recipe.of(config, policy_class(config.policy)(config), LayerShape(heads, dim, dim, dtype))
    statistics = QueryStatistics(3, heads, dim, DEVICE, sample_dtype=dtype)
    queries = torch.randn(3, 2 * heads, tokens, dim, device=DEVICE) @ torch.randn(dim, dim, device=DEVICE)
    statistics.update(queries.to(dtype))
    statistics.sample(queries.to(dtype), torch.tensor([0, 30, 7], device=DEVICE))
    statistics = statistics.with_prompt(queries.to(dtype))
    rows, starts = [1, 0, 1, 2], [9, 0, size + 9, 3]
    blocks = torch.stack([keys[r, :, s : s + size] for r, s in zip(rows, starts, strict=True)])
    of_blocks = statistics.rows(torch.tensor(rows, device=DEVICE))
    bits = recipe.plan(blocks, of_blocks)
    expected = dequantized(recipe, blocks, bits, of_blocks)

    if move_keys is not cuda.move_keys and DEVICE.type == "cpu" and dim > 144:
        pytest.skip("takes minutes when it is interpreted")
    if move_keys is cuda.move_keys and cuda.unsupported(keys, statistics.samples, recipe.layout) is not None:
        pytest.skip("not for this kernel")
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
    written = dequantized(recipe, moved, bits)
    exact = (bits == 16)[:, :, None].expand_as(moved)
    assert torch.equal(moved[exact], blocks[exact])
    assert torch.equal(keys[2], before[2])  # not active
    covariance = of_blocks.covariance()[:3]
    ours, theirs, unmoved = (
        logit_error(blocks[:3].float(), x[:3], covariance)
        for x in (written, expected, dequantized(recipe, blocks, bits))
    )
    assert (ours < 0.95 * unmoved).float().mean() > 0.8
    assert torch.allclose(ours.mean(), theirs.mean(), rtol=0.1)
    assert torch.allclose(ours, theirs, rtol=0.25)
    if dtype == torch.float32:
        # In 16 bits the moved keys are so coarse that many codes fall to either side.
        differ = (expected[:3] - written[:3]).abs() > 0.1 * (expected - blocks.float()).abs().mean()
        assert differ.float().mean() < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_queries_that_are_not_finite_move_nothing(move_keys, bad: float):
    config = MixKVQConfig.preset("default", key_feedback=0.2)
    recipe = Recipe.of(config, policy_class(config.policy)(config), LayerShape(1, 16, 16, torch.bfloat16))
    keys = torch.randn(1, 1, 128, 16, device=DEVICE).bfloat16()
    samples = torch.randn(1, 1, 32, 16, device=DEVICE).bfloat16()
    samples[..., 20, 2] = bad
    before, one = keys.clone(), torch.ones(1, dtype=torch.int32, device=DEVICE)
    bits = torch.full((1, 1, 16), 2, dtype=torch.uint8, device=DEVICE)
    options = {"damping": 0.2, "key_clip": True, "key_unbiased": True}
    move_keys(keys, one - 1, one - 1, one, bits, samples, recipe.layout, **options)
    assert torch.equal(keys, before)


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (96, torch.float16)])
def test_blocks_of_one_prompt_share_their_covariance(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Many blocks on few rows of samples: their products are summed before, and the same keys come out."""
    if DEVICE.type == "cpu":
        if emulator.COMPILER is None:
            pytest.skip("needs a GPU or g++")
        monkeypatch.setattr(cuda, "load_kernel", emulator.load_kernel)
    config = MixKVQConfig.preset("default")
    recipe = Recipe.of(config, policy_class(config.policy)(config), LayerShape(2, dim, dim, dtype))
    keys = (torch.randn(2, 2, 300, dim) * torch.logspace(-1, 0.7, dim)).to(dtype).to(DEVICE)
    samples = (torch.randn(2, 2, 150, dim) @ torch.randn(dim, dim)).to(dtype).to(DEVICE)
    samples[1, 1] = 0  # no query yet
    bits = torch.full((3, 2, dim), 2, dtype=torch.uint8, device=DEVICE)
    bits[:, :, ::3] = 4
    where = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 1, 1], [5, 0, 172], [1, 1, 1])]
    options = {"damping": 0.4, "key_clip": True, "key_unbiased": True}
    moved = []
    for blocks in (100, 1):
        monkeypatch.setattr(cuda, "SHARED_BLOCKS", blocks)
        moved.append(keys.clone())
        cuda.move_keys(moved[-1], *where, bits, samples, recipe.layout, **options)
    assert torch.equal(moved[1][1, 1], keys[1, 1])
    assert not torch.equal(moved[1][0], keys[0])
    # Sums in another order: a code may fall to the other side, and later channels follow it.
    assert ((moved[0] - moved[1]).abs() > 0.01 * keys.abs().amax((0, 1, 2))).float().mean() < 0.02


@pytest.mark.parametrize("dim", [64, 96, 256])
def test_shared_memory_is_known_in_advance(dim: int, monkeypatch: pytest.MonkeyPatch):
    config = MixKVQConfig.preset("default")
    layout = Recipe.of(config, policy_class(config.policy)(config), LayerShape(2, dim, dim, torch.float16)).layout
    macros = cuda.kernel_macros(layout, torch.float16, clip=True, unbiased=True)
    if DEVICE.type == "cpu" and emulator.COMPILER is None:
        pytest.skip("needs a GPU or g++")
    load = emulator.load_kernel if DEVICE.type == "cpu" else cuda.load_kernel
    kernel = load("feedback.cu", "move_keys", macros, 0)
    assert kernel.shared_bytes == cuda.shared_bytes(dim // feedback_parts(dim))


@pytest.mark.parametrize(
    ("text", "dim", "dtype", "reason"),
    [
        ("default:residual_length=64,key_group=64", 64, torch.bfloat16, "pages of 64 tokens"),
        ("default:key_group=16", 64, torch.bfloat16, "key groups of 16"),
        ("default", 72, torch.bfloat16, "head dimension 72"),
        ("default:scale_dtype=bfloat16", 64, torch.bfloat16, "scales in torch.bfloat16"),
        ("default", 64, torch.float32, "keys in torch.float32"),
    ],
)
def test_what_the_cuda_kernel_leaves_to_triton(
    text: str, dim: int, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda, "has_bindings", lambda: True)
    config = MixKVQConfig.parse(text)
    layout = Recipe.of(config, policy_class(config.policy)(config), LayerShape(2, dim, dim, dtype)).layout
    keys, samples = (torch.zeros(1, 2, n, dim, dtype=dtype) for n in (config.residual_length, 32))
    assert reason in cuda.unsupported(keys, samples, layout)
    monkeypatch.setattr(cuda, "has_bindings", lambda: False)
    assert "cuda-bindings is missing" in cuda.unsupported(keys, samples, layout)
