"""lm-evaluation-harness: the model ``mixkvq``, which is its ``hf`` with a quantized cache.

The harness finds models by import only, so import this module before::

    import mixkvq.adapters.lm_eval
    lm_eval.simple_evaluate(model="mixkvq", model_args="pretrained=Qwen/Qwen3-8B,cache=default", tasks=["gsm8k"])

On the command line ``mixkvq eval lm-eval`` does so, and hands everything else to ``lm_eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mixkvq.adapters.transformers import NAME, MixKVQCache, MixKVQStaticCache, confidence_processors
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.likelihood import pieces
from mixkvq.evaluate.runner import fixed_cache

#: A context and its continuation as the harness hands them over: their texts (or None), their tokens.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("mixkvq")
class MixKVQLM(HFLM):
    """A causal language model that decodes from a packed cache.

    Generation (``generate_until``) uses a :class:`MixKVQStaticCache` on a GPU and a :class:`MixKVQCache` elsewhere.

    A log-likelihood is that of the continuation while the cache is read: one pass over context and continuation would
    read nothing from it. So the context but for its last token is stored first, and what follows is fed in pieces that
    end where a block is full. A piece sees its own block in full precision and every earlier one packed, which is what
    it would see if it was decoded. Requests are scored one by one, whatever ``batch_size`` says.

    Args:
        pretrained: as for ``hf``.
        cache: a preset, with overrides if you like; ``model_args`` cannot hold a comma, so put semicolons between them:
            ``cache=default:budget=3.0;value_bits=4``.
        options: all others of ``hf``.

    Raises:
        ConfigError: the cache is none.
    """

    def __init__(self, pretrained: str | PreTrainedModel, cache: str = "default", **options: Any) -> None:
        self.cache_config = MixKVQConfig.parse(cache.replace(";", ","))
        super().__init__(pretrained=pretrained, **{**options, "backend": "causal"})
        self.model.set_attn_implementation(NAME)
        MixKVQCache(self.model.config, self.cache_config)  # complains about a model that cannot be served
        self._fixed: tuple[tuple[int, int], MixKVQStaticCache] | None = None

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As in ``hf``, with the cache."""
        cache = self._cache(context.shape[0], max_length)
        try:
            given = {"past_key_values": cache, "logits_processor": confidence_processors(cache), **generation_kwargs}
            return super()._model_generate(context, max_length, stop, **given)
        finally:
            cache.reset()

    def _cache(self, rows: int, length: int) -> MixKVQCache | MixKVQStaticCache:
        """An empty cache for so many sequences of so many tokens; the last one of a fixed size, if it serves."""
        if self.device.type != "cuda":
            return MixKVQCache(self.model.config, self.cache_config)
        if self._fixed is not None:
            (held_rows, held_length), cache = self._fixed
            if held_rows == rows and held_length >= length:
                return cache
        self._fixed = None  # first: there may not be room for both
        fixed = fixed_cache(self.model, self.cache_config, rows, length)
        if fixed is None:
            return MixKVQCache(self.model.config, self.cache_config)
        self._fixed = (rows, length), fixed
        return fixed

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether it is what greedy decoding would write."""
        results = []
        hidden = disable_tqdm or self.rank != 0
        for texts, context, continuation in tqdm(requests, desc="Running loglikelihood requests", disable=hidden):
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            results.append(self._score(torch.tensor(tokens, device=self.device), len(continuation)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    @torch.inference_mode()
    def _score(self, tokens: Tensor, scored: int) -> tuple[float, bool]:
        """The last ``scored`` of ``tokens [T]``."""
        cache = MixKVQCache(self.model.config, self.cache_config)
        fed = len(tokens) - 1
        begin = max(fed - scored, 0)
        nats, greedy = 0.0, True
        for start, stop in pieces(begin, fed, self.cache_config):
            if start == stop:
                continue
            output = self.model(tokens[None, start:stop], past_key_values=cache, use_cache=True)
            logits = output.logits[0]
            first = max(start, begin)
            if first < stop:
                cache.observe(output.logits)  # the context was a prompt, and no step
                predicted, targets = F.log_softmax(logits[first - start :].float(), -1), tokens[first + 1 : stop + 1]
                nats += F.nll_loss(predicted, targets, reduction="sum").item()
                greedy &= bool((predicted.argmax(-1) == targets).all())
        return -nats, greedy
