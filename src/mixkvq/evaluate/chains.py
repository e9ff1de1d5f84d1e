"""Problems as a chat model reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixkvq.evaluate.problems import Problem


class ChatTemplateError(ValueError):
    """A tokenizer that does not know how a chat is written."""


@dataclass(frozen=True)
class Chain:
    """A prompt and the right answer to it.

    Attributes:
        problem: what it was made of.
        tokens: ``[T]`` int64, prompt, chain, end of text.
        prompt: how many of them are the prompt.
    """

    problem: Problem
    tokens: Tensor
    prompt: int


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A user's message in the model's chat template, up to where the answer begins.

    Raises:
        ChatTemplateError: the tokenizer has no template.
    """
    if tokenizer.chat_template is None:
        raise ChatTemplateError(
            "The model has no chat template, so there is no way of asking it that it was trained for. Give an "
            "instruction-tuned model with --model."
        )
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes an answer in the chat template.

    The tokenizer's own end-of-text token need not be that, and is not always read right from GGUF files.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    rest = tokenizer(text.rpartition("ANSWER")[2].lstrip(), add_special_tokens=False)["input_ids"]
    return int(rest[0]) if rest else int(tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> Chain:
    """A problem with its right chain, which ends the way a model ends its turn."""
    prompt = prompt_tokens(tokenizer, problem.prompt)
    chain = tokenizer(problem.chain, add_special_tokens=False)["input_ids"]
    return Chain(problem, torch.tensor([*prompt, *chain, end_of_turn(tokenizer)]), len(prompt))
