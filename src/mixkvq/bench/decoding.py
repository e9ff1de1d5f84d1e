"""A model in the middle of a long text: one step takes a token of every sequence and chooses the next.

The context is not read by the model, it is filled in: random keys and values. A step waits for nothing on the host, so
it can be captured as a CUDA graph.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from mixkvq.adapters.transformers import NAME, MixKVQStaticCache, UnsupportedModelError
from mixkvq.adapters.transformers.cache import held_tensors
from mixkvq.bench.synthetic import PackedBlocks, fill_store
from mixkvq.bench.timing import FLUSHED, Timer
from mixkvq.config import MixKVQConfig
from mixkvq.models import attention

#: Name of the split-KV kernel among transformers' attention functions.
SPLIT_KV = "mixkvq_bench_split_kv"
#: Timed calls of each launch configuration of the split-KV kernel.
TUNING_REPEATS = 5


class Decoding:
    """One model and cache.

    Args:
        model: in evaluation mode.
        cache: filled with the context.
        implementation: of attention, by its name in transformers.
        batch: sequences.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, implementation: str, batch: int) -> None:
        self.model, self.cache, self.implementation = model, cache, implementation
        vocabulary = text_config(model).vocab_size
        self.tokens = torch.randint(vocabulary, (batch, 1), device=model.device)

    @property
    def on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def step(self) -> None:
        """One more token of every sequence, in place."""
        with attention(self.model, self.implementation):
            logits = self.model(
                self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **self.arguments()
            ).logits
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def arguments(self) -> dict[str, Any]:
        """What the model is called with besides."""
        return {}

    def prepare(self) -> None:
        """Choose what makes the steps fast, before they are timed."""

    def cache_bytes(self) -> int:
        """Bytes that the cache holds."""
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in held_tensors(layer))


class StockDecoding(Decoding):
    """A StaticCache in the model's type with transformers' SDPA attention, which reads the whole capacity.

    Args:
        stored: tokens of the context.
        room: tokens that may follow.
    """

    def __init__(
        self, model: PreTrainedModel, batch: int, stored: int, room: int, implementation: str = "sdpa"
    ) -> None:
        config = text_config(model)
        cache = StaticCache(config, max_cache_len=stored + room)
        heads, dim = config.num_key_value_heads, head_dim(config)
        cache.early_initialization(batch, heads, dim, model.dtype, model.device)
        for layer in cache.layers:
            if type(layer) is not StaticLayer:
                raise UnsupportedModelError(
                    f"{config.model_type} has layers without full attention ({type(layer).__name__}), which no cache "
                    "here makes faster, and which are not measured. Choose another --model or a --shape."
                )
            for tensor in _tensors(layer):
                tensor.normal_()
            layer.cumulative_length.fill_(stored)
        super().__init__(model, cache, implementation, batch)
        self.places = torch.arange(stored + room, device=model.device)
        self.lengths = torch.full((batch,), stored, dtype=torch.int32, device=model.device)

    def step(self) -> None:
        self.lengths.add_(1)
        super().step()

    def arguments(self) -> dict[str, Any]:
        # The mask that transformers would make, without its host-side checks.
        return {"attention_mask": (self.places < self.lengths[:, None])[:, None, None]}


class SplitKVDecoding(StockDecoding):
    """The same cache with the split-KV kernel of :mod:`mixkvq.bench.baseline`, which reads what is filled."""

    def __init__(self, model: PreTrainedModel, batch: int, stored: int, room: int) -> None:
        from mixkvq.bench.baseline import SPLIT_CONFIGS

        super().__init__(model, batch, stored, room, SPLIT_KV)
        self.config = SPLIT_CONFIGS[0]

    def prepare(self) -> None:
        """Choose how the kernel is launched."""
        from mixkvq.bench.baseline import tuned

        shape = text_config(self.model)
        keys, values = _tensors(self.cache.layers[0])
        query = keys.new_empty(keys.shape[0], shape.num_attention_heads, 1, keys.shape[3]).normal_()
        # A layer that is larger than the level-2 cache needs no other buffer to be cold, and there may be no room.
        timer = Timer(self.model.device, max(FLUSHED - keys.nbytes - values.nbytes, 4))
        self.config = tuned(
            query, keys, values, self.lengths, scaling=keys.shape[3] ** -0.5, timer=timer, repeats=TUNING_REPEATS
        )

    def step(self) -> None:
        # Weakly: the registry would hold this cache beside the next one.
        mine = weakref.WeakMethod(self._attend)
        AttentionInterface.register(SPLIT_KV, lambda *args, **kwargs: mine()(*args, **kwargs))  # type: ignore[misc]
        super().step()

    def arguments(self) -> dict[str, Any]:
        return {}

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        from mixkvq.bench.baseline import split_kv_attention

        output = split_kv_attention(query, key, value, self.lengths, scaling=scaling, config=self.config)
        return output.transpose(1, 2).contiguous(), None


class RandomBlocks:
    """Random blocks in the shape of a model's layers, packed once for each of a cache's settings.

    Args:
        config: the cache, which may have settings by layer.
    """

    def __init__(self, model: PreTrainedModel, config: MixKVQConfig) -> None:
        shape = text_config(model)
        self.config = config
        self._shape: dict[str, Any] = {
            "group": shape.num_attention_heads // shape.num_key_value_heads,
            "kv_heads": shape.num_key_value_heads,
            "dim": head_dim(shape),
            "dtype": model.dtype,
            "device": model.device,
        }
        self._packed: dict[MixKVQConfig, PackedBlocks] = {}

    def of(self, own: MixKVQConfig) -> PackedBlocks:
        """Those of layers with the given settings."""
        if own not in self._packed:
            self._packed[own] = PackedBlocks(own, **self._shape)
        return self._packed[own]


class PackedDecoding(Decoding):
    """Ours: a MixKVQStaticCache.

    Args:
        blocks: what to fill it with; its configuration is the cache's.
        stored: tokens of the context.
        room: tokens that may follow.
    """

    def __init__(self, model: PreTrainedModel, blocks: RandomBlocks, batch: int, stored: int, room: int) -> None:
        cache = MixKVQStaticCache(model.config, blocks.config, max_tokens=batch * (stored + room))
        super().__init__(model, cache, NAME, batch)
        super().step()  # one token, which makes the stores
        for group in cache.state.cache.groups:
            fill_store(group.store, blocks.of(group.config), stored)
        assert cache.state.positions is not None
        cache.state.positions.fill_(stored)
        self.static_cache = cache

    def cache_bytes(self) -> int:
        return self.static_cache.memory().total


def _tensors(layer: object) -> tuple[Tensor, Tensor]:
    """Keys and values of one of transformers' static layers, ``[B, Hkv, T, D]``."""
    layer = cast(StaticLayer, layer)
    return cast(Tensor, layer.keys), cast(Tensor, layer.values)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The part of a model's configuration that is about text."""
    return model.config.get_text_config(decoder=True)


def head_dim(config: PreTrainedConfig) -> int:
    """Dimension of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
