"""How likely a model with a cache is to write the right chain: accuracy's companion, without its noise.

The right chain is fed as decoding would write it, as far as the cache can tell: the prompt in one pass, and the chain
in pieces that end where a block is full. A query then sees its own block in full precision and every earlier one
packed. A chain whose every token is the most likely one is what greedy decoding would have written.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from mixkvq.adapters.transformers import NAME, MixKVQCache
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.chains import Chain
from mixkvq.evaluate.fidelity import appends
from mixkvq.models import attention
from mixkvq.store import MemoryReport

#: Bounds between chains that are reported as short, middle and long, in tokens.
LENGTHS = (300, 800)


@dataclass(frozen=True)
class ChainScore:
    """One chain under one cache.

    Attributes:
        name, family: of the problem.
        tokens: of the chain, which are those scored.
        nats: minus the log-likelihood of all of them together.
        wrong: how many of them the model would not have chosen.
    """

    name: str
    family: str
    tokens: int
    nats: float
    wrong: int


@dataclass(frozen=True)
class ChainFidelity:
    """A row of the table: all chains under one cache.

    Attributes:
        cache: the preset as it was given.
        bits: honest bits per element of the packed tokens; :attr:`MemoryReport.size_bits`.
        nats_per_chain, nats_per_token: mean negative log-likelihood.
        median: of the chains' nats, which a few chains that break altogether do not move.
        exact: share of chains that greedy decoding writes without a mistake.
        by_length: nats per chain of short, middle and long chains (:data:`LENGTHS`); None where there are none.
        scores: of the chains, in the order of the problems.
    """

    cache: str
    bits: float
    nats_per_chain: float
    nats_per_token: float
    median: float
    exact: float
    by_length: tuple[float | None, ...]
    scores: tuple[ChainScore, ...]

    @classmethod
    def of(cls, cache: str, bits: float, scores: Sequence[ChainScore]) -> ChainFidelity:
        """The row of a cache's scores."""
        nats = sum(score.nats for score in scores)
        classes: dict[int, list[float]] = defaultdict(list)
        for score in scores:
            classes[sum(score.tokens > bound for bound in LENGTHS)].append(score.nats)
        return cls(
            cache=cache,
            bits=bits,
            nats_per_chain=nats / len(scores),
            nats_per_token=nats / sum(score.tokens for score in scores),
            median=statistics.median(score.nats for score in scores),
            exact=sum(score.wrong == 0 for score in scores) / len(scores),
            by_length=tuple(statistics.fmean(classes[i]) if classes[i] else None for i in range(len(LENGTHS) + 1)),
            scores=tuple(scores),
        )

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        return asdict(self)


def chain_fidelity(
    model: PreTrainedModel,
    chains: Sequence[Chain],
    caches: Mapping[str, MixKVQConfig],
    advance: Callable[[str], None] = lambda _: None,
) -> list[ChainFidelity]:
    """Score right chains under every cache.

    Args:
        model: any that :class:`MixKVQCache` supports; its attention implementation is switched while measuring.
        caches: configurations by the name to report.
        advance: called with a name after each cache has read a chain.

    Returns:
        One row a cache, by rising honest bits.
    """
    scores: dict[str, list[ChainScore]] = {name: [] for name in caches}
    memory = {name: MemoryReport() for name in caches}
    with attention(model, NAME):
        for chain in chains:
            for name, config in caches.items():
                score, held = score_chain(model, chain, config)
                scores[name].append(score)
                memory[name] += held
                advance(name)
    rows = [ChainFidelity.of(name, memory[name].size_bits, scores[name]) for name in caches]
    return sorted(rows, key=lambda row: row.bits)


@torch.inference_mode()
def score_chain(model: PreTrainedModel, chain: Chain, config: MixKVQConfig) -> tuple[ChainScore, MemoryReport]:
    """A chain's score, and what the cache held at its end. The model's attention must be this package's."""
    cache = MixKVQCache(model.config, config)
    tokens = chain.tokens.to(model.device)
    nats, wrong = 0.0, 0
    for start, stop in pieces(chain.prompt, len(tokens) - 1, config):
        first = max(start, chain.prompt - 1)
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": stop - first}
        output = model(tokens[None, start:stop], **given)
        cache.observe(output.logits)
        logits = output.logits[0]
        targets = tokens[first + 1 : stop + 1]
        scored = F.log_softmax(logits.float(), -1)
        nats += F.nll_loss(scored, targets, reduction="sum").item()
        wrong += int((scored.argmax(-1) != targets).sum())
    problem = chain.problem
    score = ChainScore(problem.name, problem.family, len(tokens) - chain.prompt, nats, wrong)
    return score, cache.memory()


def pieces(prompt: int, length: int, config: MixKVQConfig) -> list[tuple[int, int]]:
    """Bounds of what is fed at once: the prompt, then up to the end of every block."""
    after = [(max(start, prompt), stop) for start, stop in appends(length, config) if stop > prompt]
    return [(0, min(prompt, length)), *after]
