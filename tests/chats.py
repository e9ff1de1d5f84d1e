"""A tokenizer that knows every character, with a chat template, and models that answer as a test wants it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models import tiny_model

SPECIAL = ("<unk>", "<s>", "</s>")
END = SPECIAL.index("</s>")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@cache
def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """One token for every character of ASCII, within the vocabulary of the tiny models."""
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


class Scripted:
    """Stands for a model: writes what ``reply`` makes of the prompt, and then ends, unless ``ends`` says no.

    Attributes:
        calls: the prompts of every batch.
        options: what the last ``generate`` was given.
    """

    def __init__(self, reply: Callable[[str], str], ends: Callable[[str], bool] = lambda _: True) -> None:
        self.reply, self.ends = reply, ends
        model = tiny_model("llama")
        self.config, self.device, self.generation_config = model.config, model.device, model.generation_config
        self.calls: list[list[str]] = []
        self.options: dict[str, Any] = {}

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def generate(self, ids: Tensor, *, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        assert torch.equal(attention_mask, attention_mask.sort(1).values), "padding is on the left"
        tokenizer, self.options = chat_tokenizer(), options
        prompts = [str(tokenizer.decode(row[mask.bool()])) for row, mask in zip(ids, attention_mask, strict=True)]
        prompts = [prompt.removeprefix("<s>user\n").removesuffix("</s>\n<s>assistant\n") for prompt in prompts]
        self.calls.append(prompts)
        rows = [self._row(prompt, max_new_tokens) for prompt in prompts]
        longest = max(map(len, rows))
        pad = options["pad_token_id"]
        return torch.cat([ids, torch.tensor([row + [pad] * (longest - len(row)) for row in rows])], 1)

    def _row(self, prompt: str, limit: int) -> list[int]:
        tokens = chat_tokenizer()(self.reply(prompt), add_special_tokens=False)["input_ids"]
        ending = [END] if self.ends(prompt) else tokens[-1:] * limit
        return [*tokens, *ending][:limit]
