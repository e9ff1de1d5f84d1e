"""How far a cached model strays from the same model in full precision, on text.

The real cache is fed in appends of R tokens. A query then sees its own block in full precision and every earlier
block packed, which is exactly what it would see when the text was decoded token by token from an empty cache.

A cache that evicts is fed in appends of :data:`EVICTED_TOGETHER` tokens, for it cuts to its budget after every one: a
query sees at most so many tokens more than when decoding. It is told the model's confidence at every token, from the
logits of the pass itself, and then holds as many tokens as after steps of one token each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.adapters.transformers import NAME, MixKVQCache
from mixkvq.config import MixKVQConfig
from mixkvq.models import attention
from mixkvq.policies import policy_class
from mixkvq.store import MemoryReport

#: Tokens that an evicting cache is fed at once.
EVICTED_TOGETHER = 16
#: Tokens at the start of a window that are not scored: before the first flush every cache is exact.
WARM_UP = 128


@dataclass(frozen=True)
class Fidelity:
    """One row of the table. Bits are per element of the packed tokens; ``kl`` is in nats per token.

    Attributes:
        cache: the preset as it was given.
        key_bits_codes, value_bits_codes: bits of the codes alone.
        key_bits, value_bits, bits: honest bits, with scales, zeros and tier index.
        bits_held: everything that was held, over the elements of all tokens seen.
        size_bits: what caches are compared by: :attr:`MemoryReport.size_bits`.
        sized_by_all: whether these count everything held: :attr:`MemoryReport.sized_by_all`.
        bytes_held: everything the cache held at the end of a window, mean over windows.
        perplexity, reference_perplexity: of the same tokens, with the cache and in full precision.
        kl: mean ``KL(full precision || cached)``.
        top1_agreement: share of tokens where both put the same token first.
        tokens: how many tokens were scored.
    """

    cache: str
    key_bits_codes: float
    key_bits: float
    value_bits_codes: float
    value_bits: float
    bits: float
    bits_held: float
    size_bits: float
    sized_by_all: bool
    bytes_held: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float
    tokens: int

    def as_dict(self) -> dict[str, float | int | str]:
        """Fields by name, for JSON."""
        return dataclasses.asdict(self)


class _Tally:
    """Sums over the windows of one cache."""

    def __init__(self) -> None:
        self.loss = self.reference_loss = self.kl = self.agree = 0.0
        self.tokens = self.windows = 0
        self.memory = MemoryReport()

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Log-probabilities ``[L, V]`` in full precision, logits ``[L, V]``, next tokens ``[L]``."""
        cached = F.log_softmax(logits.float(), -1)
        self.loss += F.nll_loss(cached, targets, reduction="sum").item()
        self.reference_loss += F.nll_loss(reference, targets, reduction="sum").item()
        self.kl += F.kl_div(cached, reference, reduction="sum", log_target=True).item()
        self.agree += (cached.argmax(-1) == reference.argmax(-1)).sum().item()
        self.tokens += len(targets)

    def row(self, name: str) -> Fidelity:
        memory = self.memory
        return Fidelity(
            cache=name,
            key_bits_codes=memory.key_bits_codes,
            key_bits=memory.key_bits,
            value_bits_codes=memory.value_bits_codes,
            value_bits=memory.value_bits,
            bits=memory.bits,
            bits_held=memory.bits_held,
            size_bits=memory.size_bits,
            sized_by_all=memory.sized_by_all,
            bytes_held=memory.total // self.windows,
            perplexity=math.exp(self.loss / self.tokens),
            reference_perplexity=math.exp(self.reference_loss / self.tokens),
            kl=self.kl / self.tokens,
            top1_agreement=self.agree / self.tokens,
            tokens=self.tokens,
        )


def fidelity(
    model: PreTrainedModel,
    windows: Tensor,
    caches: Mapping[str, MixKVQConfig],
    advance: Callable[[str], None] = lambda _: None,
    references: Sequence[Tensor] | None = None,
) -> list[Fidelity]:
    """Compare caches with full precision on windows of text.

    Args:
        model: any that :class:`MixKVQCache` supports; its attention implementation is switched while measuring.
        windows: ``[N, W]`` token numbers; every window is read from an empty cache.
        caches: configurations by the name to report.
        advance: called with a name after each cache (and ``"reference"``) has read a window.
        references: :func:`reference_log_probs` of each window, if they are there already.

    Returns:
        One row a cache, by rising size in bits.
    """
    tallies = {name: _Tally() for name in caches}
    for at, window in enumerate(windows.to(model.device)):
        reference = reference_log_probs(model, window) if references is None else references[at]
        advance("reference")
        with attention(model, NAME):
            for name, config in caches.items():
                _read_window(model, window, reference, config, tallies[name])
                advance(name)
    return sorted((tally.row(name) for name, tally in tallies.items()), key=lambda row: row.size_bits)


@torch.inference_mode()
def reference_log_probs(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Full precision log-probabilities ``[W, V]`` float32 of what follows each token of ``window [W]``."""
    with attention(model, NAME):  # soft caps and attention sinks included, which "sdpa" leaves out or refuses
        logits = model(window[None], use_cache=False).logits[0]
    return F.log_softmax(logits.float(), -1)


def appends(length: int, config: MixKVQConfig) -> list[tuple[int, int]]:
    """Bounds of the appends that a text is fed in: the sinks with the first block, then block by block."""
    size = EVICTED_TOGETHER if policy_class(config.policy).evicts else config.residual_length
    bounds, start = [], 0
    while start < length:
        stop = start + size + (config.sinks if start == 0 else 0)
        bounds.append((start, min(stop, length)))
        start = stop
    return bounds


@torch.inference_mode()
def _read_window(
    model: PreTrainedModel, window: Tensor, reference: Tensor, config: MixKVQConfig, tally: _Tally
) -> None:
    cache = MixKVQCache(model.config, config)
    for start, stop in appends(len(window), config):
        output = model(window[None, start:stop], past_key_values=cache, use_cache=True)
        cache.observe(output.logits)
        logits = output.logits[0]
        first, last = max(start, WARM_UP), min(stop, len(window) - 1)
        if first < last:
            tally.add(reference[first:last], logits[first - start : last - start], window[first + 1 : last + 1])
    tally.memory += cache.memory()
    tally.windows += 1
