"""Lets a model answer a task's questions, in batches, with one cache after the other.

All caches go through the same code: on a GPU a :class:`MixKVQStaticCache` for each, whose decoding ``generate``
compiles once, and elsewhere a :class:`MixKVQCache` for each batch. Full precision is the preset ``bf16``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.adapters.transformers import NAME, MixKVQCache, MixKVQStaticCache, confidence_processors
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.answers import Answer, AnswerFile, Settings, config_fields
from mixkvq.evaluate.chains import end_of_turn, prompt_tokens
from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.tasks import Question, Task
from mixkvq.layers.expected import fits_fixed
from mixkvq.models import attention, context_length

#: Habits that a model's own generation settings may have, switched off: they are not part of any task.
PLAIN: dict[str, Any] = {
    "num_beams": 1,
    "top_k": None,
    "min_p": None,
    "typical_p": None,
    "repetition_penalty": None,
    "no_repeat_ngram_size": None,
    "min_new_tokens": None,
    "min_length": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


@dataclass(frozen=True)
class Item:
    """An answer to be written.

    Attributes:
        question: to what.
        sample: which of its answers.
        prompt: its tokens.
        chain_tokens: of the question's chain, or None.
        limit: new tokens at most.
    """

    question: Question
    sample: int
    prompt: list[int]
    chain_tokens: int | None
    limit: int

    @property
    def key(self) -> tuple[str, int]:
        """Question and sample."""
        return self.question.name, self.sample

    @property
    def length(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.prompt) + self.limit


@dataclass(frozen=True)
class Written:
    """What a model wrote: tokens, without the end token; whether there was one; bits as in :class:`Answer`."""

    tokens: list[int]
    finished: bool
    bits: float | None


class Run:
    """A task for a model.

    Args:
        model: any that :class:`MixKVQCache` supports.
        tokenizer: with a chat template.
        task: what to ask.
        settings: as they will stand in the answers.
        batch: sequences that are written together.
        static: whether to use a cache of a fixed size; None does so on a GPU.

    Attributes:
        items: all answers to be written with each cache, longest first: what does not fit into memory does not fit at
            the start, and batches hold little padding.
        batches: all items, as they are written together. They do not depend on what is already answered, so that a
            run that goes on samples what it would have sampled at once.
        clipped: questions whose answers the model's context makes shorter than they may be.
        ends: tokens that end an answer.

    Raises:
        ChatTemplateError: the model has no chat template.
        EvaluationError: a question leaves no room for an answer, or for its right chain, in the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        settings: Settings,
        *,
        batch: int,
        static: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.task, self.settings = model, tokenizer, task, settings
        self.static = model.device.type == "cuda" if static is None else static
        self.clipped = 0
        items = [item for question in task.questions for item in self._items(question)]
        self.items = sorted(items, key=lambda item: -item.length)
        self.batch = min(batch, len(items))
        self.batches = [self.items[start : start + self.batch] for start in range(0, len(items), self.batch)]
        self.ends = end_tokens(model, tokenizer)

    def _items(self, question: Question) -> list[Item]:
        prompt = prompt_tokens(self.tokenizer, question.prompt)
        chain_tokens = None
        if question.chain is not None:
            chain_tokens = len(self.tokenizer(question.chain, add_special_tokens=False)["input_ids"]) + 1
        limit = self._limit(question, len(prompt), chain_tokens)
        return [Item(question, sample, prompt, chain_tokens, limit) for sample in range(self.task.samples)]

    def _limit(self, question: Question, prompt: int, chain_tokens: int | None) -> int:
        """New tokens that an answer may take, within the model's context."""
        asked, context = self.settings.max_new_tokens or self.task.room(chain_tokens), context_length(self.model)
        if context is None or asked <= context - prompt:
            return asked
        room = context - prompt
        if room < 1:
            raise EvaluationError(
                f"Question {question.name} has {prompt:,} tokens and leaves no room for an answer in the model's "
                f"context of {context:,}. Give a model with a longer context with --model."
            )
        if chain_tokens is not None and room < chain_tokens:
            raise EvaluationError(
                f"Question {question.name} has {prompt:,} tokens and its right answer takes {chain_tokens:,}, which is "
                f"more than the model's context of {context:,}: no cache could be right. Ask for shorter chains with "
                "--longest, or give a model with a longer context with --model."
            )
        self.clipped += 1
        return room

    def answers(
        self,
        caches: Mapping[str, MixKVQConfig],
        kept: Sequence[Answer],
        file: AnswerFile,
        advance: Callable[[str, int], None] = lambda *_: None,
    ) -> list[Answer]:
        """All answers with every cache.

        Args:
            kept: those that need not be written again.
            file: gets the others, batch by batch.
            advance: called with a cache's name, and how many of its answers there are.
        """
        answers = list(kept)
        with attention(self.model, NAME):
            for name, config in caches.items():
                done = {(answer.question, answer.sample) for answer in kept if answer.cache == name}
                count = sum(item.key in done for item in self.items)
                advance(name, count)
                todo = [batch for batch in self.batches if any(item.key not in done for item in batch)]
                for written in self._answered(name, config, todo):
                    # Of a batch that was partly answered, what is there stays.
                    new = [answer for answer in written if (answer.question, answer.sample) not in done]
                    file.append(new)
                    answers += new
                    count += len(new)
                    advance(name, count)
        return answers

    def _answered(self, name: str, config: MixKVQConfig, batches: Sequence[Sequence[Item]]) -> Iterator[list[Answer]]:
        """The answers with one cache, batch by batch."""
        fixed = self._static_cache(config) if self.static and batches else None
        for batch in batches:
            if fixed is None:
                written = self._write(MixKVQCache(self.model.config, config), batch)
            else:
                # Always as many rows, so that one compilation serves all batches.
                full = [*batch, *[batch[-1]] * (self.batch - len(batch))]
                written = self._write(fixed, full)[: len(batch)]
                fixed.reset()
            yield [self._judge(name, config, item, each) for item, each in zip(batch, written, strict=True)]

    def _static_cache(self, config: MixKVQConfig) -> MixKVQStaticCache | None:
        """A cache with room for any batch, or None where none of a fixed size serves."""
        longest = max(max(len(x.prompt) for x in batch) + max(x.limit for x in batch) for batch in self.batches)
        return fixed_cache(self.model, config, self.batch, longest)

    def _write(self, cache: MixKVQCache | MixKVQStaticCache, batch: Sequence[Item]) -> list[Written]:
        """Let the model write a batch, one answer for each row."""
        ids, mask = left_padded([item.prompt for item in batch], self.ends[0], self.model.device)
        torch.manual_seed(batch_seed(self.settings.seed, batch))
        out = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=confidence_processors(cache),
            max_new_tokens=max(item.limit for item in batch),
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
            **self._sampling(),
            **PLAIN,
        )
        bits = cache.memory().quantized_bits
        rows = out[:, ids.shape[1] :].tolist()
        return [self._cut(row, item.limit, bits) for row, item in zip(rows, batch, strict=True)]

    def _sampling(self) -> dict[str, Any]:
        if self.settings.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None}
        return {"do_sample": True, "temperature": self.settings.temperature, "top_p": self.settings.top_p}

    def _cut(self, row: list[int], limit: int, bits: float | None) -> Written:
        """A row as far as its answer goes: rows are as long as the batch's longest."""
        row = row[:limit]
        end = next((at for at, token in enumerate(row) if token in self.ends), None)
        return Written(row[:end], end is not None, bits)

    def _judge(self, name: str, config: MixKVQConfig, item: Item, written: Written) -> Answer:
        question = item.question
        text = str(self.tokenizer.decode(written.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return Answer(
            task=self.task.name,
            question=question.name,
            sample=item.sample,
            cache=name,
            config=config_fields(config),
            text=text,
            new_tokens=len(written.tokens) + written.finished,
            finished=written.finished,
            correct=written.finished and self.task.grade(question, text),
            right=question.right,
            family=question.family,
            chain_tokens=item.chain_tokens,
            exact=None if question.chain is None else written.finished and text == question.chain,
            bits=written.bits,
            settings=self.settings,
        )


def fixed_cache(model: PreTrainedModel, config: MixKVQConfig, rows: int, length: int) -> MixKVQStaticCache | None:
    """A cache of a fixed size for so many sequences of so many tokens each, or None where none serves.

    All of them are as long as the longest: one that came to its end is padded until the others do.
    """
    if not fits_fixed(config, model.device):
        return None
    pages = -(-length // config.residual_length)
    return MixKVQStaticCache(model.config, config, max_tokens=rows * pages * config.residual_length)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the chat template's first, then what the model and the tokenizer name.

    The token that begins a text is among them: a model that writes it has come to the end of its answer.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, tokenizer.bos_token_id]
    return list(dict.fromkeys([end_of_turn(tokenizer), *(int(token) for token in named if token is not None)]))


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token numbers ``[B, L]`` with padding at the start, and 1 where there is none."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[*[pad] * (length - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (length - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def batch_seed(seed: int, batch: Sequence[Item]) -> int:
    """A seed for the sampling of a batch, the same for every cache."""
    keys = [item.key for item in batch]
    return int.from_bytes(hashlib.sha256(repr((seed, keys)).encode()).digest()[:7])
