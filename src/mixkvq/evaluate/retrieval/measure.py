"""Asks a model with a cache for what is hidden in a context.

A cache reads its first tokens in full precision, all at once, and packs them then. If the question came with them, it
would look for its answer, and find it, in full precision: the first token of the answer would not have read a packed
number at all, and the later ones could read it off the question's own last tokens, whose deeper layers hold it already.
So the context comes first, alone, and is packed. The question comes after it and reads packed pages, as the next turn
of a conversation does, and so does every token of the answer. It is fed in pieces that end where blocks do, which is
what decoding it token by token would come to. As always the newest tokens, fewer than a block, are not packed: what is
hidden at the very end of a context is often among them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.adapters.transformers import NAME, MixKVQCache
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.likelihood import pieces
from mixkvq.evaluate.retrieval.problems import SPARE, RetrievalProblem
from mixkvq.evaluate.runner import end_tokens
from mixkvq.models import attention


@dataclass(frozen=True)
class Reply:
    """One problem with one cache.

    Attributes:
        name: of the problem.
        found: share of the wanted words that the model wrote.
        log_probability: of the right answer, mean over its tokens, in nats.
        text: what the model wrote.
    """

    name: str
    found: float
    log_probability: float
    text: str


@dataclass(frozen=True)
class Cell:
    """All problems of one kind, length and depth with one cache.

    Attributes:
        cache: as it was given.
        kind, length, depth: of the problems.
        found, log_probability: means over the problems.
        bits: honest bits per packed element, mean over batches; None if nothing was packed.
        replies: to the problems, in their order.
    """

    cache: str
    kind: str
    length: int
    depth: float
    found: float
    log_probability: float
    bits: float | None
    replies: tuple[Reply, ...]

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        return asdict(self)


def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[RetrievalProblem],
    caches: Mapping[str, MixKVQConfig],
    *,
    batch: int,
    advance: Callable[[str, int], None] = lambda *_: None,
) -> list[Cell]:
    """Ask all problems with every cache.

    Args:
        model: any that :class:`MixKVQCache` supports; its attention implementation is switched while measuring.
        problems: those of a kind, length and depth next to each other.
        caches: configurations by the name to report.
        batch: problems that are read together.
        advance: called after each batch with the cache's name and the tokens of its problems.

    Returns:
        A row for each kind, length, depth and cache.
    """
    cells = []
    with attention(model, NAME):
        for _, group in itertools.groupby(problems, lambda problem: (problem.kind, problem.length, problem.depth)):
            alike = list(group)
            for name, config in caches.items():
                asked = []
                for start in range(0, len(alike), batch):
                    together = alike[start : start + batch]
                    asked.append(ask(model, tokenizer, together, config))
                    advance(name, sum(problem.length for problem in together))
                cells.append(_cell(name, alike[0], asked))
    return cells


def _cell(cache: str, like: RetrievalProblem, asked: Sequence[tuple[list[Reply], float | None]]) -> Cell:
    replies = tuple(reply for batch, _ in asked for reply in batch)
    return Cell(
        cache=cache,
        kind=like.kind,
        length=like.length,
        depth=like.depth,
        found=mean(reply.found for reply in replies),
        log_probability=mean(reply.log_probability for reply in replies),
        bits=None if asked[0][1] is None else mean(bits for _, bits in asked if bits is not None),
        replies=replies,
    )


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[RetrievalProblem],
    config: MixKVQConfig,
) -> tuple[list[Reply], float | None]:
    """Replies to problems whose prompts are of one length, and honest bits per packed element, if any are.

    The model's attention must be this package's.
    """
    cache = MixKVQCache(model.config, config)
    logits = _read(model, cache, problems)
    memory = cache.memory()
    # Every problem goes on as two sequences that share their pages: one is told the right answer, one writes its own.
    cache.batch_repeat_interleave(2)
    ends = end_tokens(model, tokenizer)
    likelihoods, written = _decode(model, cache, logits, [problem.answer for problem in problems], ends)
    replies = [
        _reply(tokenizer, problem, likelihood, row, ends)
        for problem, likelihood, row in zip(problems, likelihoods, written, strict=True)
    ]
    return replies, memory.quantized_bits


def _read(model: PreTrainedModel, cache: MixKVQCache, problems: Sequence[RetrievalProblem]) -> Tensor:
    """Feed the contexts, then the questions; logits ``[B, V]`` of what comes next."""
    prompts = torch.tensor([problem.tokens for problem in problems], device=model.device)
    # Questions of a batch differ by a token or two. Where one is shorter, it takes the last words before it along.
    context = min(problem.context for problem in problems)
    for start, stop in pieces(context, prompts.shape[1], cache.config):
        logits = _step(model, cache, prompts[:, start:stop])
    return logits


def _decode(
    model: PreTrainedModel, cache: MixKVQCache, logits: Tensor, answers: Sequence[list[int]], ends: Sequence[int]
) -> tuple[list[float], list[list[int]]]:
    """Go on token by token with pairs of sequences ``[2B]``: of each, the first is told its answer, and the second
    writes the likeliest token.

    Returns:
        The answers' mean log-probabilities per token, and what was written.
    """
    longest = max(map(len, answers))
    padded = [[*answer, *[ends[0]] * (longest + SPARE - len(answer))] for answer in answers]
    told = torch.tensor(padded, device=logits.device)
    logits = logits.repeat_interleave(2, 0)
    log_probabilities, written = [], []
    for step, token in enumerate(told.unbind(1), 1):
        log_probabilities.append(F.log_softmax(logits[0::2].float(), -1).gather(1, token[:, None]))
        written.append(logits[1::2].argmax(-1))
        if step >= longest and all(any(end in row for end in ends) for row in _rows(written)):
            break
        logits = _step(model, cache, torch.stack([token, written[-1]], 1).view(-1, 1))
    scored = torch.cat(log_probabilities, 1)
    means = [row[: len(answer)].mean().item() for row, answer in zip(scored, answers, strict=True)]
    return means, _rows(written)


def _step(model: PreTrainedModel, cache: MixKVQCache, tokens: Tensor) -> Tensor:
    """Logits ``[B, V]`` of what comes after ``tokens [B, L]``, which the cache takes."""
    logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cache.observe(logits)
    return logits[:, -1]


def _rows(written: Sequence[Tensor]) -> list[list[int]]:
    """Tokens ``[B]`` of each step, sequence by sequence."""
    return torch.stack(list(written), 1).tolist()


def _reply(
    tokenizer: PreTrainedTokenizerBase,
    problem: RetrievalProblem,
    log_probability: float,
    written: Sequence[int],
    ends: Sequence[int],
) -> Reply:
    row = list(itertools.takewhile(lambda token: token not in ends, written))
    text = str(tokenizer.decode(row, skip_special_tokens=True))
    words = re.findall(r"\w+", text)
    found = sum(word in words for word in problem.wanted) / len(problem.wanted)
    return Reply(problem.name, found, log_probability, text)


def mean(numbers: Iterable[float]) -> float:
    """Of at least one number."""
    listed = list(numbers)
    return math.fsum(listed) / len(listed)
