"""One text from a model and a cache, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mixkvq.adapters.transformers import NAME, MixKVQCache, MixKVQStaticCache, confidence_processors
from mixkvq.models import attention


@dataclass(frozen=True)
class Generation:
    """What was written, and how fast.

    Attributes:
        text, tokens: what was written.
        prompt_tokens: how many tokens were read.
        seconds: reading and writing together.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second, the reading of the prompt included."""
        return len(self.tokens) / self.seconds

    def common_prefix(self, other: Generation) -> int:
        """Tokens until the two texts part."""
        pairs = enumerate(zip(self.tokens, other.tokens, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.tokens), len(other.tokens)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    cache: Cache | None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = False,
) -> Generation:
    """Generate from ``ids [1, L]``.

    Args:
        cache: a fresh one of this package's, or of the library's, which gets the library's attention; None is a
            DynamicCache.
        temperature: 0 is greedy.
        stream: print the text as it comes.
    """
    ids = ids.to(model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None  # type: ignore[arg-type]
    if cache is None:
        cache = DynamicCache(config=model.config)
    with attention(model, NAME if isinstance(cache, (MixKVQCache, MixKVQStaticCache)) else "sdpa"):
        start = time.perf_counter()
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            logits_processor=confidence_processors(cache),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
        seconds = time.perf_counter() - start
    tokens = out[0, ids.shape[1] :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generation(str(text), tokens, ids.shape[1], seconds)
