"""Random tensors and tiny models of the real classes."""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. Threads of their own would wait for each other in every small operation.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a module with kernels is imported

from chats import chat_tokenizer
from mixkvq import MixKVQConfig, all_presets
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import LayerCache, Step, new_layer_cache
from mixkvq.layers.expected import expected_kernel
from mixkvq.policies import policy_class
from mixkvq.quant.rope import Rope
from models import tiny_model


def evicts(preset: str) -> bool:
    """Whether a preset's cache does not keep all tokens; those have no pages, and tests of their own."""
    return policy_class(MixKVQConfig.preset(preset).policy).evicts


#: Every preset that keeps all tokens, and overrides that reach what no preset does: both thresholds crossed, odd
#: widths, small blocks.
CONFIGS = [
    *(name for name in all_presets() if not name.startswith("paper-") and not evicts(name)),
    "paper:tau_bf16=2.2,tau_uint4=1.2",
    "paper:salience=error,tau_bf16=2.2,tau_uint4=1.5,residual_length=32",
    "kivi-2:key_bits=3,value_bits=3",
    "kivi-2:key_bits=8,value_bits=8,residual_length=64,key_group=16",
    "default:budget=3.2,value_bits=4,residual_length=256,scale_dtype=bfloat16",
    "default:budget_scope=head,value_group=24",
    "default:value_bits=16",
    "default:key_feedback=0.2",
    "kivi-2:key_axis=token,key_bits=3,key_group=24,key_clip=true",
]


def has_rule(config: MixKVQConfig) -> bool:
    """Whether a device can decide the bits."""
    return policy_class(config.policy)(config).rule is not None


def has_kernels(config: MixKVQConfig) -> bool:
    """Whether GPU kernels plan, write and read its pages."""
    return has_rule(config) and expected_kernel(config, 2, 16) != "torch"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a chat template."""
    path = tmp_path_factory.mktemp("chat")
    chat_tokenizer().save_pretrained(path)
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> MixKVQConfig:
    """Every configuration that a matrix test runs over."""
    return MixKVQConfig.parse(request.param)


@pytest.fixture(params=[text for text in CONFIGS if has_kernels(MixKVQConfig.parse(text))])
def kernel_config(request: pytest.FixtureRequest) -> MixKVQConfig:
    """Those that GPU kernels serve."""
    return MixKVQConfig.parse(request.param)


#: Those whose bits a device can decide.
WITH_RULES = [text for text in CONFIGS if has_rule(MixKVQConfig.parse(text))]


@pytest.fixture(params=WITH_RULES)
def static_config(request: pytest.FixtureRequest) -> MixKVQConfig:
    """Those that a cache of a fixed size serves."""
    return MixKVQConfig.parse(request.param)


def random_step(
    batch: int, length: int, heads: int = 4, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32
) -> Step:
    """Random queries, keys and values; channels differ in scale and offset, as real ones do."""
    spread = torch.logspace(-1, 0.7, dim)[torch.randperm(dim)]
    keys = torch.randn(batch, kv_heads, length, dim) * spread + torch.randn(dim)
    query, values = torch.randn(batch, heads, length, dim), torch.randn(batch, kv_heads, length, dim)
    return Step(query.to(dtype), keys.to(dtype), values.to(dtype))


def layer_cache(config: MixKVQConfig, step: Step) -> LayerCache:
    """An empty cache of one layer for steps of that shape."""
    rope = Rope.of_base(step.keys.shape[3])
    return new_layer_cache(config, policy_class(config.policy)(config), step, rope)


def tokens(cache: LayerCache, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of a sequence in order, as they are stored."""
    store = cache.store
    sinks = min(store.lengths[row], store.sinks)
    waiting = store._waiting(row)
    parts = [(store.dense_keys[row, :, :sinks], store.dense_values[row, :, :sinks])]
    if store.tables[row]:
        parts.append(dequantize_pages(store.packed(), row, rotated=cache.rotated))
    residual = slice(store.sinks, store.sinks + waiting)
    parts.append((store.dense_keys[row, :, residual], store.dense_values[row, :, residual]))
    return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)
