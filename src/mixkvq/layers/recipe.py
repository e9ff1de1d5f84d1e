"""How blocks of tokens become pages: plan, quantize, pack, as one configuration and one page format want it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.kernels.decode import has_kernels, unserved
from mixkvq.policies import KeyBlock, Policy
from mixkvq.quant.affine import is_clipped
from mixkvq.quant.block import (
    DENSE_BITS,
    QuantizedKeys,
    QuantizedValues,
    quantize_keys,
    quantize_keys_per_token,
    quantize_values,
)
from mixkvq.quant.feedback import Feedback, rounding_order
from mixkvq.quant.outliers import take_outliers
from mixkvq.quant.rope import Rope
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store import PageLayout

#: Numbers that are quantized at once when a long prompt is flushed, to bound memory.
MAX_QUANTIZED = 1 << 23


@dataclass(frozen=True)
class LayerShape:
    """What a model says of a layer's keys and values.

    Attributes:
        kv_heads, key_dim, value_dim: of a token.
        dtype: the model's type.
        rope: of the keys; None where it is not known, and not needed.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    rope: Rope | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, rope: Rope | None = None) -> LayerShape:
        """That of a layer with such ``keys, values [B, Hkv, L, D]``."""
        return cls(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, rope)


def page_layout(config: MixKVQConfig, policy: Policy, shape: LayerShape) -> PageLayout:
    """The page format that a configuration leads to in a layer.

    Raises:
        ConfigError: keys are quantized before RoPE, and the shape does not say what that is.
    """
    before = config.key_rope == "before" and config.key_bits != DENSE_BITS
    if before and shape.rope is None:
        raise ConfigError("key_rope='before' needs the layer's RoPE, which is not known here: set key_rope to 'after'.")
    return PageLayout(
        kv_heads=shape.kv_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        tokens=config.residual_length,
        key_bits=config.key_bits,
        key_group=config.key_scales(shape.key_dim),
        value_bits=config.value_bits,
        value_groups=config.value_groups(shape.value_dim),
        promoted_bits=policy.promoted_bits,
        param_dtype=config.param_dtype,
        dense_dtype=shape.dtype,
        value_symmetric=config.value_symmetric,
        key_axis=config.key_axis,
        key_rotated=config.key_rotation == "hadamard" and config.key_bits != DENSE_BITS,
        key_rope=shape.rope if before else None,
        key_levels=config.key_levels,
        value_levels=config.value_levels,
        outliers=config.outliers,
    )


@dataclass(frozen=True)
class Recipe:
    """A configuration, the policy that decides the bits, and the page format that both lead to."""

    config: MixKVQConfig
    policy: Policy
    layout: PageLayout

    @classmethod
    def of(cls, config: MixKVQConfig, policy: Policy, shape: LayerShape) -> Recipe:
        """The recipe for layers of the given shape; see :func:`page_layout`."""
        if config.layers:
            raise ConfigError("This takes the settings of one layer, and the configuration has settings by layer.")
        if policy.evicts:
            raise ConfigError(
                f"The {policy.name} policy evicts tokens, and pages keep all: use MixKVQCache, or another policy."
            )
        return cls(config, policy, page_layout(config, policy, shape))

    @property
    def rotated(self) -> bool:
        """Whether values are stored rotated."""
        return self.config.value_rotation == "hadamard" and self.config.value_bits != DENSE_BITS

    @property
    def promoted(self) -> dict[int, int] | None:
        """Channels of a page that each promoted width gets, all heads together; None where data decides."""
        return self.policy.promoted_channels(self.layout.kv_heads, self.layout.key_dim)

    @property
    def chunks_per_page(self) -> dict[int, int] | None:
        """Chunks of a page by promoted width, where these are the same for all pages; None where data decides."""
        if self.promoted is None:
            return None
        return {bits: self.layout.chunks_for(bits, self.promoted.get(bits, 0)) for bits in self.layout.promoted_bits}

    @property
    def needs_statistics(self) -> bool:
        """Whether anything is kept of the queries."""
        return self.policy.uses_queries or self.sample_dtype is not None

    @property
    def sample_dtype(self) -> torch.dtype | None:
        """The type of the queries that are kept for error feedback; None without it."""
        feeds_back = self.config.key_feedback is not None and self.config.key_bits != DENSE_BITS
        return self.layout.dense_dtype if feeds_back else None

    def new_statistics(self, batch: int, device: torch.device) -> QueryStatistics | None:
        """What is kept of the queries of a batch, or None."""
        if not self.needs_statistics:
            return None
        heads = self.layout.kv_heads, self.layout.key_dim
        return QueryStatistics(batch, *heads, device, sample_dtype=self.sample_dtype)

    def plan(self, keys: Tensor, statistics: QueryStatistics | None) -> Tensor:
        """Each channel's width, ``[N, Hkv, D]`` uint8, for blocks ``keys [N, Hkv, R, D]``, a row of statistics each."""
        importance = statistics.importance() if statistics is not None and self.policy.uses_queries else None
        bits = self.policy.plan(KeyBlock(keys, importance))
        allowed = (self.config.key_bits, *self.policy.promoted_bits)
        wanted = torch.Size((*keys.shape[:2], keys.shape[3]))
        if bits.shape != wanted or bits.dtype != torch.uint8 or not set(bits.unique().tolist()) <= set(allowed):
            raise ValueError(
                f"The policy {type(self.policy).__name__} planned {bits.dtype} {list(bits.shape)} with the widths "
                f"{bits.unique().tolist()}; a plan is uint8 {list(wanted)}, of the widths {list(allowed)}."
            )
        return bits.contiguous()  # kernels read it as it lies

    def quantize(
        self,
        keys: Tensor,
        values: Tensor,
        bits: Tensor,
        statistics: QueryStatistics | None,
        first: Tensor | None = None,
    ) -> tuple[QuantizedKeys, QuantizedValues]:
        """Codes of blocks ``keys, values [N, Hkv, R, D]`` at planned ``bits [N, Hkv, D]``, a row of statistics each.

        Args:
            first: ``[N]``, the number in its sequence of each block's first token; needed with ``layout.key_rope``.
        """
        layout = self.layout
        if layout.key_rope is not None:
            assert first is not None
            keys = layout.key_rope.undo(keys, first)
        key_group = {"dim": 2 if layout.key_axis == "channel" else 3, "group": layout.key_group}
        value_group = {"dim": 3, "group": layout.value_dim // layout.value_groups}
        keys, key_outliers = take_outliers(keys, layout.key_outliers, **key_group)
        values, value_outliers = take_outliers(values, layout.value_outliers, **value_group)
        return (
            replace(self._quantize_keys(keys, bits, statistics), outliers=key_outliers),
            replace(self._quantize_values(values), outliers=value_outliers),
        )

    def _quantize_values(self, values: Tensor) -> QuantizedValues:
        config = self.config
        return quantize_values(
            values,
            config.value_bits,
            groups=self.layout.value_groups,
            clip=config.value_clip,
            unbiased=config.value_unbiased,
            symmetric=config.value_symmetric,
            rotation=self.rotated,
            param_dtype=config.param_dtype,
            levels=config.value_levels,
        )

    def _quantize_keys(self, keys: Tensor, bits: Tensor, statistics: QueryStatistics | None) -> QuantizedKeys:
        config, layout = self.config, self.layout
        options: dict[str, Any] = {"unbiased": config.key_unbiased, "param_dtype": config.param_dtype}
        options["levels"] = config.key_levels
        if config.key_axis == "token":
            options |= {"groups": layout.key_dim // layout.key_group, "rotation": layout.key_rotated}
            return quantize_keys_per_token(keys, bits, config.key_bits, clip=config.key_clip, **options)
        clip = config.key_clip and is_clipped(config.key_bits)  # promoted widths are higher still
        feedback = self._feedback(keys, bits, statistics)
        return quantize_keys(keys, bits, group=config.key_group, clip=clip, feedback=feedback, **options)

    def _feedback(self, keys: Tensor, bits: Tensor, statistics: QueryStatistics | None) -> Feedback | None:
        """How errors travel in blocks ``keys [N, Hkv, R, D]`` planned at ``bits``, a row of statistics each."""
        damping = self.config.key_feedback
        covariance = None if statistics is None else statistics.covariance()
        if damping is None or covariance is None:
            return None
        exact, config = bits == DENSE_BITS, self.config
        order = rounding_order(keys, covariance, exact, group=config.key_group, bits=config.key_bits)
        return Feedback.of(covariance, order, damping)

    def packs_on(self, device: torch.device) -> bool:
        """Whether the kernels below run there, and can write the pages; otherwise torch operations do."""
        return has_kernels(device) and not self._unpacked

    def decodes_on(self, device: torch.device) -> bool:
        """Whether a device has kernels that read the cache; otherwise torch operations do."""
        return has_kernels(device) and not unread(self.layout, self.policy)

    @property
    def _unpacked(self) -> str | None:
        """Why no kernel writes the pages, or None."""
        tokens = self.layout.tokens
        no_tiles = f"its residual_length is not a power of two, but {tokens}" if tokens & (tokens - 1) else None
        return unserved(self.layout) or no_tiles

    def warn_of_torch(self, device: torch.device) -> None:
        """Say that a GPU works without kernels, once for all layers: it has none for this cache, or none at all."""
        kernels = has_kernels(device)
        if not kernels and device.type != "cuda":
            return
        if reason := unread(self.layout, self.policy):
            warnings.warn(
                f"No GPU kernel serves this cache, as {reason}: torch operations do, which are much slower. "
                "`mixkvq caches` lists what runs on kernels.",
                stacklevel=2,
            )
        elif not kernels:
            warnings.warn(
                "The GPU kernels need Triton, which is not installed: torch operations do their work, which are much "
                'slower. Install it with: pip install "mixkvq[kernels]".',
                stacklevel=2,
            )

    def check_kernels(self, device: torch.device) -> None:
        """Refuse a device with kernels that do not serve this recipe, where nothing else can pack: in CUDA graphs."""
        if has_kernels(device) and self._unpacked:
            raise ValueError(
                f"On a GPU a cache of a fixed size is packed by kernels. None serves this one, as {self._unpacked}: "
                "change that, or use MixKVQCache, which packs by torch operations where it must."
            )

    def plan_on_device(
        self,
        keys: Tensor,
        rows: Tensor,
        starts: Tensor,
        active: Tensor,
        statistics: QueryStatistics | None,
    ) -> Tensor:
        """The same by :func:`mixkvq.kernels.triton.plan.plan_blocks`, which see, for a policy that has a rule."""
        from mixkvq.kernels.triton.plan import plan_blocks

        assert self.policy.rule is not None
        total, count = (None, None) if statistics is None else (statistics.total, statistics.count)
        return plan_blocks(keys, rows, starts, active, total, count, self.policy.rule, self.layout)

    def move_on_device(
        self,
        keys: Tensor,
        rows: Tensor,
        starts: Tensor,
        active: Tensor,
        bits: Tensor,
        statistics: QueryStatistics | None,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """The keys to pack: with error feedback by :func:`mixkvq.kernels.feedback.move_keys`, which see.

        A copy, as ``keys`` may be the model's own, unless they may change ``in_place``.
        """
        damping = self.config.key_feedback
        if statistics is None or statistics.samples is None or damping is None:
            return keys
        keys = keys if in_place else keys.clone()
        from mixkvq.kernels.feedback import move_keys

        move_keys(
            keys,
            rows,
            starts,
            active,
            bits,
            statistics.samples,
            self.layout,
            damping=damping,
            key_clip=self.config.key_clip,
            key_unbiased=self.config.key_unbiased,
        )
        return keys

    def pack_on_device(
        self,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        starts: Tensor,
        bits: Tensor,
        page_numbers: Tensor,
        run_starts: dict[int, Tensor],
        pages: Tensor,
        chunks: dict[int, Tensor],
    ) -> None:
        """Quantize and pack by :func:`mixkvq.kernels.triton.pack.pack_blocks`, which see."""
        from mixkvq.kernels.triton.pack import pack_blocks

        pack_blocks(
            keys,
            values,
            rows,
            starts,
            bits,
            page_numbers,
            run_starts,
            pages,
            chunks,
            self.layout,
            key_clip=self.config.key_clip,
            key_unbiased=self.config.key_unbiased,
            value_clip=self.config.value_clip,
            value_unbiased=self.config.value_unbiased,
            rotated=self.rotated,
        )


def unread(layout: PageLayout, policy: Policy) -> str | None:
    """Why no kernel of a GPU reads a cache of a layer, which is then left to torch operations, or None."""
    if policy.recent:
        return f"it keeps a share of the context out of its pages (recent={policy.recent:g})"
    return unserved(layout)
