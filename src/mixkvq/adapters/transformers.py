"""Hugging Face transformers: cache, attention function, mask function.

A model calls ``cache.update(keys, values, layer)`` and then the attention function with what that returned, and the
cache is not among its arguments. So ``update`` returns handles instead of tensors, and the attention function takes
the layer from the handle. A model that touches keys or values in between fails loudly, instead of computing nonsense.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from mixkvq.cache import LayerCache, Step
from mixkvq.config import MixKVQConfig
from mixkvq.kernels.partial import dense_attention, merge
from mixkvq.policies import Policy, policy_class
from mixkvq.store import MemoryReport

#: ``attn_implementation`` of a model that is to use the cache.
NAME = "mixkvq"

#: Additive masks hide a token with this or less: the largest number that is in use for it.
HIDDEN = -1e4

logger = logging.get_logger(__name__)


class UnsupportedModelError(RuntimeError):
    """The model's architecture does something with its keys and values that the packed cache cannot serve."""


class KVHandle:
    """Stands for a layer's keys or values between ``update`` and the attention function.

    Has ``shape`` (with all tokens seen), ``dtype`` and ``device``; anything else raises.
    """

    def __init__(self, layer: MixKVQLayer, tensor: Tensor, length: int) -> None:
        self.layer = layer
        self.tensor = tensor
        self.shape = torch.Size((*tensor.shape[:2], length, tensor.shape[3]))
        self.dtype = tensor.dtype
        self.device = tensor.device

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedModelError(
            "This model works on keys or values between the cache and the attention function, where the packed cache "
            "has no tensors. Either the model was not loaded with attn_implementation='mixkvq', or its architecture "
            "does not go through transformers' attention interface and cannot use MixKVQCache."
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copying, pickling and the like ask for these and expect a plain no
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls._refuse(None)  # type: ignore[arg-type]

    __getitem__ = __matmul__ = __rmatmul__ = __add__ = __mul__ = __len__ = __iter__ = _refuse


class MixKVQLayer(CacheLayerMixin):
    """One full-attention layer of a :class:`MixKVQCache`.

    Attributes:
        cache: the packed cache, once the first tokens have come.
        record_past: hold the newest tokens back until the next step, so that ``crop`` takes them back exactly; assisted
            decoding asks for it.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, config: MixKVQConfig, policy: Policy, masks: MaskReader, expected: ExpectedShape) -> None:
        super().__init__()
        self.config = config
        self.policy = policy
        self.masks = masks
        self.expected = expected
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.cache: LayerCache | None = None
        self.is_initialized = False
        self.seen = 0  # positions, padding included
        self.real: Tensor | None = None  # [B, seen] bool; None while no padding was seen
        self.pending: tuple[Tensor, Tensor] | None = None
        self.held: Step | None = None

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: :meth:`attend` makes the cache when it has seen a query."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new keys and values ``[B, Hkv, L, D]``; returns a handle for each, for the attention function."""
        self.expected.check(key_states)
        if self.config.debug:
            for name, tensor in (("keys", key_states), ("values", value_states)):
                if not bool(tensor.isfinite().all()):
                    raise FloatingPointError(f"The model produced NaN or infinity in its {name}.")
        self.pending = key_states, value_states
        length = self.seen + key_states.shape[2]
        return KVHandle(self, key_states, length), KVHandle(self, value_states, length)

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        """Forget all tokens and give their memory back."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows (numbers or a boolean mask); named twice, a row shares its pages."""
        if self.cache is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._commit()
        self.cache.select([row % self.cache.store.batch for row in indices.tolist()])
        if self.real is not None:
            self.real = self.real[indices.to(self.real.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.batch_select_indices(torch.arange(self.cache.store.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` positions; see :meth:`mixkvq.cache.LayerCache.crop`."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer, as in "
                "transformers' own caches."
            )
        count = min(-tokens_to_remove, self.seen)
        if count == 0 or self.cache is None:
            return
        kept = self.seen - count
        if self.held is not None:
            left = self.held.length - count
            self.held = self.held.tokens(0, left) if left > 0 else None
            count = max(-left, 0)
        stored = kept + count  # positions that are in the store, before the cut
        if count:
            if self.real is None:
                removed = [count] * self.cache.store.batch
            else:
                removed = self.real[:, kept:stored].sum(1).tolist()
            self.cache.crop(removed)
        self.seen = kept
        if self.real is not None:
            self.real = self.real[:, :kept]

    # What the attention function calls

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float, **options: Any) -> Tensor:
        """Attention of ``query [B, Hq, L, D]`` over all tokens; stores the pending ones. Returns ``[B, L, Hq, D]``."""
        if self.pending is None:
            raise UnsupportedModelError(
                "Keys and values of one layer reached the attention function twice (shared between layers?), which "
                "the packed cache does not support."
            )
        keys, values = self.pending
        self.pending = None
        visible, real = self.masks.read(mask, query.shape[2])
        step = Step(query, keys, values, real)
        self._commit()
        if self.cache is None:
            self.cache = LayerCache(self.config, self.policy, step)
            self.is_initialized = True
        elif self.cache.store.batch != query.shape[0]:
            raise ValueError(
                f"The cache holds a batch of {self.cache.store.batch} and was given one of {query.shape[0]}. Use a "
                "new MixKVQCache, or reset() this one."
            )
        if self.config.debug:
            self._check_past(mask, step)
        if self.seen == 0 and not any(option is not None for option in options.values()):
            output = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0]
        else:
            output = self.cache.attend(step, visible, scaling=scaling, **options).transpose(1, 2)
        self._take(step)
        return output

    def _take(self, step: Step) -> None:
        """Store a step's tokens, or hold them back."""
        if step.real is not None and self.real is None:
            self.real = step.real.new_ones(step.real.shape[0], self.seen)
        if self.real is not None:
            real = step.real
            if real is None:
                real = self.real.new_ones(self.real.shape[0], step.length)
            self.real = torch.cat([self.real, real], 1)
        self.seen += step.length
        self.held = step
        if self.record_past:
            # Enough for any draft, and no more than a page: a long prompt is not to wait unpacked.
            early = step.length - self.config.residual_length
            if early > 0:
                assert self.cache is not None
                self.cache.append(step.tokens(0, early))
                self.held = step.tokens(early, step.length)
        else:
            self._commit()

    def _commit(self) -> None:
        if self.held is not None:
            assert self.cache is not None
            self.cache.append(self.held)
            self.held = None

    def _check_past(self, mask: Tensor | None, step: Step) -> None:
        if mask is None or self.seen == 0:
            return
        past = _to_bool(mask)[:, 0, :, : self.seen]
        wanted = past.new_ones(1, self.seen) if self.real is None else self.real
        rows = past.new_ones(1, step.length) if step.real is None else step.real
        if bool(((past != wanted[:, None]) & rows[:, :, None]).any()):
            raise UnsupportedModelError(
                "The attention mask hides tokens that are already in the cache from some of the new ones. Packed "
                "tokens are visible to every query of their sequence."
            )

    def memory(self) -> MemoryReport:
        """Bytes held by this layer."""
        if self.cache is None:
            return MemoryReport()
        report = self.cache.memory()
        if self.held is not None:
            held = (self.held.query, self.held.keys, self.held.values)
            report.parts["residual"] += sum(tensor.nbytes for tensor in held)
            tokens = step_tokens(self.held)
            report.elements += tokens * (held[1][0, :, 0].numel() + held[2][0, :, 0].numel())
        return report


def step_tokens(step: Step) -> int:
    """Real tokens of a step, over the batch."""
    return step.keys.shape[0] * step.length if step.real is None else int(step.real.sum())


class MixKVQCache(Cache):
    """A KV cache in 2 to 4 bits for any model of transformers that goes through its attention interface.

    Layers with full attention are quantized; sliding windows, linear attention and the like keep the library's own
    layers. The model must have been loaded with ``attn_implementation="mixkvq"``::

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mixkvq")
        cache = MixKVQCache(model.config, MixKVQConfig.preset("default"))
        model.generate(**inputs, past_key_values=cache)

    Args:
        model_config: ``model.config``.
        config: how keys and values are stored: a :class:`MixKVQConfig`, or text for :meth:`MixKVQConfig.parse`.
        policy: one of your own that decides the bits, instead of the one that ``config.policy`` names.

    Raises:
        UnsupportedModelError: multi-head latent attention, layers that share keys and values, encoder-decoders.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: MixKVQConfig | str = "default",
        policy: Policy | None = None,
    ) -> None:
        if isinstance(config, str):
            config = MixKVQConfig.parse(config)
        if not isinstance(model_config, PreTrainedConfig):
            raise TypeError(
                f"MixKVQCache takes the model's configuration (model.config) first, not {type(model_config).__name__}."
            )
        self.config = config
        text_config = model_config.get_text_config(decoder=True)
        _refuse_unsupported(model_config, text_config)
        if policy is None:
            policy = policy_class(config.policy)(config)
        masks, expected = MaskReader(), ExpectedShape(text_config)
        layers = [
            MixKVQLayer(config, policy, masks, expected) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=model_config).layers
        ]
        if not any(isinstance(layer, MixKVQLayer) for layer in layers):
            raise UnsupportedModelError(
                f"None of the {len(layers)} layers of this {text_config.model_type} model has full attention: there "
                "is nothing to quantize."
            )
        super().__init__(layers=layers)

    @property
    def quantized_layers(self) -> list[MixKVQLayer]:
        """The layers that this package stores."""
        return [layer for layer in self.layers if isinstance(layer, MixKVQLayer)]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`MixKVQLayer.update`; layers that are not quantized return tensors."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"The model has a layer {layer_idx}, but this cache was built for one of {len(self.layers)} layers. "
                "Build it from this model's config: MixKVQCache(model.config, ...)."
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(keys, Tensor):
            keys._mixkvq = True  # type: ignore[attr-defined]  # not a stock cache: see `_warn_if_stock`
        return keys, values

    def memory(self) -> MemoryReport:
        """Bytes held, by part, over all layers, and bits per element."""
        report = MemoryReport()
        for layer in self.layers:
            if isinstance(layer, MixKVQLayer):
                report += layer.memory()
            else:
                held = (value for value in vars(layer).values() if isinstance(value, Tensor))
                report.parts["other layers"] += sum(tensor.nbytes for tensor in held)
        return report

    def __repr__(self) -> str:
        return f"MixKVQCache({len(self.quantized_layers)} of {len(self.layers)} layers, {self.config})"


class ExpectedShape:
    """What a model's configuration says of its keys, to recognise a cache that was built for another model."""

    def __init__(self, config: PreTrainedConfig) -> None:
        heads = getattr(config, "num_attention_heads", None)
        # Some models without grouped queries carry a number of key/value heads that they do not use.
        self.heads = {n for n in (getattr(config, "num_key_value_heads", None), heads) if isinstance(n, int)}
        self.head_dim = getattr(config, "head_dim", None)
        if self.head_dim is None and isinstance(heads, int) and hasattr(config, "hidden_size"):
            self.head_dim = config.hidden_size // heads
        self.model_type = config.model_type

    def check(self, keys: Tensor) -> None:
        """Raise a ``ValueError`` unless keys ``[B, Hkv, L, D]`` are that model's, or a tensor-parallel share."""
        _, heads, _, dim = keys.shape
        right_heads = not self.heads or any(n % heads == 0 for n in self.heads)
        right_dim = not isinstance(self.head_dim, int) or self.head_dim == dim
        if not (right_heads and right_dim):
            raise ValueError(
                f"This cache was built for a {self.model_type} model with {min(self.heads)} key/value heads of "
                f"dimension {self.head_dim}, and was given keys of {heads} heads of dimension {dim}. "
                "Build it from this model's config: MixKVQCache(model.config, ...)."
            )


class MaskReader:
    """Reads a forward pass's mask once for all layers: reading it may wait for the device."""

    def __init__(self) -> None:
        self._mask: Callable[[], Tensor | None] = lambda: None
        self._result: tuple[Tensor | None, Tensor | None] = (None, None)

    def read(self, mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
        """Which of ``length`` new tokens sees which, and which are real.

        Args:
            mask: ``[B, 1, L, T]``, bool or additive with 0 and very negative numbers, or None: causal, no padding.

        Returns:
            ``visible [B, L, L]`` and ``real [B, L]``, bool; None for a plain causal one, and where all are real. A
            token is real if it sees itself.
        """
        if mask is None:
            return None, None
        if self._mask() is not mask:
            if mask.dim() != 4 or mask.shape[1] != 1:
                raise UnsupportedModelError(
                    f"The packed cache takes masks of shape [batch, 1, queries, keys], not {list(mask.shape)}."
                )
            visible = _to_bool(mask)[:, 0, :, -length:]
            real = visible.diagonal(dim1=1, dim2=2)
            self._result = visible, None if bool(real.all()) else real
            self._mask = weakref.ref(mask)
        return self._result


def _to_bool(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    shown, hidden = mask == 0, mask <= HIDDEN
    if not bool((shown | hidden).all()):
        raise UnsupportedModelError("The packed cache does not take attention biases, only masks of 0 and -infinity.")
    return shown


def _refuse_unsupported(config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{text.model_type} uses multi-head latent attention (MLA): its cache is a low-rank latent already, and "
            "keys are made from it inside the layer. MixKVQCache does not support it."
        )
    if getattr(text, "num_kv_shared_layers", None) or getattr(text, "kv_sharing_modes", None):
        raise UnsupportedModelError(
            f"{text.model_type} shares keys and values between layers, which MixKVQCache does not support."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder; MixKVQCache supports decoder-only models."
        )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``attn_implementation="mixkvq"``: packed attention for handles, the library's own for plain tensors.

    Args:
        module: the attention module.
        query: ``[B, Hq, L, D]`` after RoPE.
        key, value: handles of a :class:`MixKVQLayer`, or tensors ``[B, Hkv, T, D]``.
        attention_mask: from :func:`transformers.masking_utils.sdpa_mask`.
        scaling: factor of the logits; ``D ** -0.5`` if None.
        softcap: soft cap of the logits (Gemma 2).
        s_aux: ``[Hq]`` attention sink logits (GPT-OSS).

    Returns:
        ``[B, L, Hq, D]``, and None: attention weights are not available.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError("The packed cache does not take attention biases (position_bias).")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(key, KVHandle):
        output = key.layer.attend(module, query, attention_mask, scaling, softcap=softcap, sinks=s_aux)
        return output.contiguous(), None
    assert isinstance(value, Tensor)
    _warn_if_stock(module, query, key)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, length, _ = query.shape
    kv_heads, total = key.shape[1:3]
    visible = None
    if attention_mask is not None:
        visible = _to_bool(attention_mask)[:, :, None]
    elif length > 1:
        visible = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    rows = (query.float() * scaling).unflatten(1, (kv_heads, heads // kv_heads))
    part = dense_attention(rows, key, value, visible, softcap)
    sinks = None
    if s_aux is not None:
        sinks = s_aux.float().view(kv_heads, -1, 1).expand(-1, -1, length).flatten(1)
    output = merge([part], sinks).view(batch, heads, length, -1)
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def _warn_if_stock(module: nn.Module, query: Tensor, key: Tensor) -> None:
    has_past = key.shape[2] > query.shape[2] and not getattr(module, "is_cross_attention", False)
    if has_past and not hasattr(key, "_mixkvq"):
        logger.warning_once(
            "attn_implementation='mixkvq' is running with a stock cache: nothing is being quantized. Pass "
            "past_key_values=MixKVQCache(model.config, MixKVQConfig.preset('default'))."
        )


def register() -> None:
    """Make ``attn_implementation="mixkvq"`` known to transformers. Importing :mod:`mixkvq` does it."""
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name every mask would be None, and left padding silently wrong.
    AttentionMaskInterface.register(NAME, sdpa_mask)


__all__: Sequence[str] = (
    "NAME",
    "KVHandle",
    "MixKVQCache",
    "MixKVQLayer",
    "UnsupportedModelError",
    "attention_forward",
    "register",
)
