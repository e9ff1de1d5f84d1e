"""CONF-KV (arXiv 2605.24786): how many tokens are kept follows the model's confidence, which ones their attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixkvq.config import ConfigError, MixKVQConfig, Preset
from mixkvq.policies.evicting import PACKED_BITS, EvictingPolicy

SOURCE = "CONF-KV, arXiv 2605.24786"
#: What entropy, margin and the likeliest token's probability count for in the confidence.
ENTROPY_SHARE, MARGIN_SHARE, TOP_SHARE = 0.4, 0.3, 0.3
#: Tokens that every layer keeps, whatever ``keep_decay`` says.
FLOOR = 96
FIELDS = {
    "policy": "conf-kv",
    "keep": 512,
    "keep_confident": 256,
    "key_bits": PACKED_BITS,
    "value_bits": PACKED_BITS,
}


class ConfKV(EvictingPolicy):
    """Keeps ``keep_confident`` tokens after a confident step and ``keep`` after others, the newest ones in the model's
    type and older ones in INT8.

    Which tokens: the ``protected`` newest, and of the others those that rank highest by a moving average of the
    attention they get, and by how new they are. Differences from the paper: docs/conf_kv.md.
    """

    name = "conf-kv"
    fields = EvictingPolicy.fields | {"keep_confident", "keep_decay", "confidence", "protected", "mass_share"}
    uses_mass = uses_confidence = True
    presets = {  # noqa: RUF012
        "conf-kv": Preset(
            "at most 512 tokens a layer, 256 after confident steps; all but the newest in INT8, others evicted",
            SOURCE,
            FIELDS,
        ),
        "conf-kv-l": Preset(
            "the same with fewer tokens in later layers, down to half",
            SOURCE,
            {**FIELDS, "keep_decay": 0.5},
        ),
    }

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        super().check(config)
        if config.keep_confident is None:
            raise ConfigError("The conf-kv policy needs keep_confident, the tokens to keep after a confident step.")
        assert config.keep is not None
        least = config.sinks + config.protected
        if config.keep_decay != 1:
            least = max(least, FLOOR)
        if not least <= config.keep_confident <= config.keep:
            raise ConfigError(
                f"keep_confident lies between {least} (sinks, protected tokens, and {FLOOR} with keep_decay) and keep "
                f"({config.keep}); keep_confident={config.keep_confident} was given."
            )

    @classmethod
    def for_layer(cls, config: MixKVQConfig, index: int, count: int) -> MixKVQConfig:
        if config.keep_decay == 1:
            return config
        assert config.keep is not None
        assert config.keep_confident is not None
        least, decay = config.sinks + config.protected, config.keep_decay
        return config.replace(
            keep=max(least, layer_budget(config.keep, decay, index, count)),
            keep_confident=max(least, layer_budget(config.keep_confident, decay, index, count)),
            keep_decay=1.0,
        )

    @property
    def protected(self) -> int:
        return self.config.protected

    def budget(self, confidence: float | None) -> int:
        if confidence is not None and confidence >= self.config.confidence:
            assert self.config.keep_confident is not None
            return self.config.keep_confident
        return super().budget(confidence)

    def rank(self, steps: Tensor, mass: Tensor | None, free: Tensor) -> Tensor:
        """``alpha * a + (1 - alpha) * r``: attention mass ``a`` and step ``r``, from 0 to 1 over the free tokens."""
        assert mass is not None
        share = self.config.mass_share
        return share * normalised(mass, free) + (1 - share) * normalised(steps.float(), free)


def confidence(logits: Tensor) -> Tensor:
    """How sure the model is of its next token: 0 to 1.

    ``.4 (1 - H(p) / log V) + .3 sigmoid(log p1 - log p2) + .3 p1``, with the probabilities ``p1 >= p2`` of the two
    likeliest tokens. A token that was ruled out (a logit of minus infinity) counts in V alone.

    Args:
        logits: ``[..., V]``, V at least 2.

    Returns:
        ``[...]`` float32.
    """
    log_p = logits.float().log_softmax(-1)
    first, second = log_p.topk(2).values.unbind(-1)
    certainty = 1 - torch.special.entr(log_p.exp()).sum(-1) / math.log(logits.shape[-1])
    return ENTROPY_SHARE * certainty + MARGIN_SHARE * (first - second).sigmoid() + TOP_SHARE * first.exp()


def layer_budget(keep: int, decay: float, index: int, count: int) -> int:
    """The ``-L`` variant: ``max(96, N * decay^(l / L))`` for layer ``index`` of ``count``, in whole tokens."""
    return max(FLOOR, int(keep * decay ** (index / count)))


def normalised(x: Tensor, free: Tensor) -> Tensor:
    """``x [T]`` from 0 to 1 between the least and the largest of the ``free`` ones; 0 where these are equal."""
    low = x.masked_fill(~free, float("inf")).amin()
    high = x.masked_fill(~free, float("-inf")).amax()
    span = high - low
    return torch.where(span > 0, (x - low) / span, 0.0)
