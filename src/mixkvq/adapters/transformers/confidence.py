"""How a cache learns in ``generate`` what the model made of each step."""

from __future__ import annotations

from torch import FloatTensor, LongTensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from mixkvq.adapters.transformers.cache import MixKVQCache


class ConfidenceProcessor(LogitsProcessor):
    """Hands the logits of every step to a cache, and leaves them as they are."""

    def __init__(self, cache: MixKVQCache) -> None:
        self.cache = cache

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """``scores [B, V]`` of the newest tokens."""
        self.cache.observe(scores[:, None])
        return scores


def confidence_processors(cache: Cache) -> LogitsProcessorList:
    """What ``generate`` needs for a cache that follows the model's confidence; for any other cache nothing::

        model.generate(**inputs, past_key_values=cache, logits_processor=confidence_processors(cache))

    Logits are taken before temperature, top-k and the like, and after a repetition penalty. With beams, each beam is a
    sequence of its own.
    """
    processors = LogitsProcessorList()
    if isinstance(cache, MixKVQCache) and cache.uses_confidence:
        processors.append(ConfidenceProcessor(cache))
    return processors
