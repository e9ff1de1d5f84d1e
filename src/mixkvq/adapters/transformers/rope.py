"""How a model turns the keys of a layer (RoPE), for caches that quantize keys before it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.quant.rope import Rope

#: Models with sliding windows whose other layers, which are the ones to be quantized, have no RoPE.
ONLY_WINDOWS_HAVE_ROPE = frozenset(("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1"))
#: Tokens by which a :class:`Rope` is compared with the model's own functions.
COMPARED = 16


def rope_of(config: PreTrainedConfig, layer: int) -> Rope:
    """The RoPE of a layer with full attention, which the model's own functions are asked for.

    Frequencies are those of a short sequence ("longrope" has others beyond its original length), without the factor
    that "yarn" and others have in the logits.

    Args:
        config: of the decoder.
        layer: its number.

    Raises:
        UnsupportedModelError: there is none of a kind that is known.
    """
    if not _has_rope(config, layer):
        return Rope()
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else None
    given = getattr(config, "rope_parameters", None) or {}
    _check_kind(config, given.get(kind) or given)
    embedding, apply = _functions(config)
    try:
        inv_freq, turned = _turned(embedding(config), apply, kind)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _unknown(config, f"its functions are not those of other models: {error}") from error
    for interleaved in (False, True):
        rope = Rope(tuple(inv_freq.tolist()), interleaved)
        still = turned[:, :, :1].expand_as(turned)
        if torch.allclose(rope.apply(still, torch.zeros(1)), turned, atol=1e-4):
            return rope
    raise _unknown(config, "its pairs of channels are neither halves nor neighbours")


def _has_rope(config: PreTrainedConfig, layer: int) -> bool:
    if uses := getattr(config, "no_rope_layers", None):  # in spite of its name, 1 where there is RoPE
        return bool(uses[layer])
    return config.model_type not in ONLY_WINDOWS_HAVE_ROPE or getattr(config, "sliding_window", None) is None


def _check_kind(config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    """Refuse angles that depend on more than a token's number."""
    if "dynamic" in str(parameters.get("rope_type")):
        raise _unknown(config, "its frequencies change with the length")
    if "mrope_section" in parameters:
        raise _unknown(config, "tokens of images have several positions")


def _functions(config: PreTrainedConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of the model's module, the class that makes cosines and sines, and the function that applies them."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None:
        raise _unknown(config, "it is no causal language model of transformers")
    names = vars(sys.modules[model.__module__])
    found = [x for name, x in names.items() if name.endswith("RotaryEmbedding") and "Vision" not in name]
    if len(found) != 1 or "apply_rotary_pos_emb" not in names:
        raise _unknown(config, "it has no rotary embedding, or not one alone")
    return found[0], names["apply_rotary_pos_emb"]


def _turned(embedding: nn.Module, apply: Callable[..., Any], kind: str | None) -> tuple[Tensor, Tensor]:
    """The model's frequencies, and what it makes of the same key at tokens 0, 1, 2 and so on, ``[1, 1, T, D]``."""
    own = f"{kind}_inv_freq"
    options = {"layer_type": kind} if hasattr(embedding, own) else {}
    inv_freq = getattr(embedding, own if options else "inv_freq")
    keys = torch.linspace(1, 2, 2 * len(inv_freq)).expand(1, 1, COMPARED, -1)
    cos, sin = embedding(keys, torch.arange(COMPARED)[None], **options)
    return inv_freq, apply(keys, keys, cos, sin)[1]


def _unknown(config: PreTrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"key_rope='before' takes RoPE back from keys, and that of this {config.model_type} model is not known: {why}. "
        "Set key_rope to 'after', as in rotatekv-2:key_rope=after."
    )
