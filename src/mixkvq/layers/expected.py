"""What a configuration comes to, before there is a cache of it: bits, and which kernels read it."""

from __future__ import annotations

import torch

from mixkvq.config import MixKVQConfig
from mixkvq.kernels.decode import has_kernels, kernel_of_format
from mixkvq.layers.recipe import LayerShape, page_layout, unread
from mixkvq.policies import Policy, policy_class
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.rope import Rope
from mixkvq.store import MemoryReport, PageLayout


def expected_bits(
    config: MixKVQConfig, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float, bool]:
    """Honest bits per packed key and value element, as the page format has them; with eviction, of whole blocks.

    Returns:
        key bits, value bits, and whether these are final: a policy with thresholds promotes channels by the data, and
        key bits are then those without any.
    """
    if policy_class(config.policy).evicts:
        bits = float(config.key_bits)
        if bits != DENSE_BITS:
            bits += 8 * config.param_dtype.itemsize / config.key_group
        return bits, bits, True
    layout, policy = _expected_layout(config, kv_heads, head_dim, dtype)
    promoted = policy.promoted_channels(kv_heads, head_dim)
    page = MemoryReport(layout.part_bytes(promoted or {}))
    page.packed_keys = page.packed_values = kv_heads * layout.tokens * head_dim
    return page.key_bits, page.value_bits, promoted is not None


def fits_fixed(config: MixKVQConfig, device: torch.device) -> bool:
    """Whether a cache of a fixed size serves a configuration on a device; the growing one serves all."""
    for own in [config.for_layer(i) for i in range(len(config.layers))] or [config]:
        policy = policy_class(own.policy)(own)
        if policy.evicts or policy.rule is None or (has_kernels(device) and expected_kernel(own, 2, 16) == "torch"):
            return False
    return True


def expected_kernel(config: MixKVQConfig, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """What a GPU reads the pages with, as :func:`mixkvq.kernels.decode.kernel_of_format` has it.

    Caches that evict have no pages, and are read by torch operations.
    """
    if policy_class(config.policy).evicts:
        return "torch"
    layout, policy = _expected_layout(config, kv_heads, head_dim, dtype)
    return "torch" if unread(layout, policy) else kernel_of_format(layout, dtype)


def _expected_layout(
    config: MixKVQConfig, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[PageLayout, Policy]:
    policy = policy_class(config.policy)(config)
    return page_layout(config, policy, LayerShape(kv_heads, head_dim, head_dim, dtype, Rope())), policy
