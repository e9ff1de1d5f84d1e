"""``mixkvq generate``: text from a model whose cache is quantized."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from mixkvq.adapters.transformers import MixKVQCache, MixKVQStaticCache
from mixkvq.cli.common import CacheHelp, DeviceOption, InputError, ModelOption, clean_exit, notes, output, print_json
from mixkvq.cli.loading import load_model, parse_dtype, warn_of_other_weights
from mixkvq.config import MixKVQConfig
from mixkvq.generation import Generation, generate_text
from mixkvq.models import context_length
from mixkvq.report.tables import memory_table, size
from mixkvq.store import MemoryReport

PROMPT = "Write a long and detailed story about an old lighthouse keeper who finds a message in a bottle."


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; '-' reads standard input.")] = None,
    model: ModelOption = None,
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "default",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run BF16 beside it, and show where the texts part.")
    ] = False,
    fixed: Annotated[
        bool,
        typer.Option("--compile", help="Allocate the cache once, so that a GPU decodes by CUDA graphs. Starts slowly."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="The model's type.")] = "bfloat16",
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text and tables.")] = False,
) -> None:
    """Write text with a quantized cache, and say what the cache took."""
    with clean_exit():
        config = MixKVQConfig.parse(cache)
        if max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {max_new_tokens}: ask for at least one.")
        if temperature < 0:
            raise InputError(f"--temperature {temperature}: it is 0 or more.")
        question = PROMPT if prompt is None else sys.stdin.read() if prompt == "-" else prompt
        if not question.strip():
            raise InputError("The prompt is empty.")
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        warn_of_other_weights(network, {cache: config})
        ids = _tokens(tokenizer, question, raw)
        limit = context_length(network)
        if limit is not None and ids.shape[1] >= limit:
            raise InputError(f"The prompt has {ids.shape[1]:,} tokens; the model's context is {limit:,}.")
        if limit is not None and ids.shape[1] + max_new_tokens > limit:
            max_new_tokens = limit - ids.shape[1]
            notes.print(f"The model's context leaves room for {max_new_tokens:,} new tokens.")
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if not as_json:
            notes.print(question.strip()[:400] + "\n", style="dim", markup=False, highlight=False)
        packed, stock_cache = _caches(network, config, ids.shape[1] + max_new_tokens if fixed else None)
        ours = generate_text(network, tokenizer, ids, packed, stream=not as_json, **options)
        stock = None
        if compare:
            with notes.status("The same with a BF16 cache …"):
                stock = generate_text(network, tokenizer, ids, stock_cache, stream=False, **options)
        if as_json:
            print_json(_as_dict(cache, packed.memory(), ours, stock))
            return
        output.print()
        memory = packed.memory()
        output.print(_summary(cache, memory, ours, stock))
        output.print(memory_table(memory))
        if memory.total > memory.bf16:
            notes.print(
                f"A text this short takes more than BF16: the newest {config.residual_length} tokens stay unpacked, "
                "and room for them is held from the start."
            )
        if stock is not None:
            _print_difference(tokenizer, ours, stock)


def _caches(
    model: PreTrainedModel, config: MixKVQConfig, length: int | None
) -> tuple[MixKVQCache | MixKVQStaticCache, StaticCache | None]:
    """The cache, and the library's own one to compare it with: of a fixed length, or growing (None)."""
    if length is None:
        return MixKVQCache(model.config, config), None
    packed = MixKVQStaticCache(model.config, config, max_tokens=length)
    return packed, StaticCache(config=model.config, max_cache_len=length)


def _tokens(tokenizer: PreTrainedTokenizerBase, question: str, raw: bool) -> torch.Tensor:
    if tokenizer.chat_template is None or raw:
        return torch.tensor([tokenizer(question)["input_ids"]])
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def _summary(name: str, memory: MemoryReport, ours: Generation, stock: Generation | None) -> Table:
    table = Table(title=f"{ours.prompt_tokens} tokens read, {len(ours.tokens)} written", title_justify="left")
    for column in ("cache", "bytes held", "against BF16", "bits per element, packed", "tokens per second"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    packed = f"{memory.bits:.2f}" if memory.packed_keys else "nothing packed yet"
    ratio = memory.bf16 / memory.total
    against = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
    table.add_row(escape(name), size(memory.total), against, packed, f"{ours.tokens_per_second:.1f}")
    speed = "" if stock is None else f"{stock.tokens_per_second:.1f}"
    table.add_row("BF16", size(memory.bf16), "", "16", speed)
    return table


def _print_difference(tokenizer: PreTrainedTokenizerBase, ours: Generation, stock: Generation) -> None:
    same = ours.common_prefix(stock)
    if same == len(ours.tokens) == len(stock.tokens):
        output.print(f"Both caches gave the same {same} tokens.")
        return
    output.print(f"The texts agree for {same} tokens and then part:")
    before = tokenizer.decode(ours.tokens[max(0, same - 12) : same])
    for name, run in (("quantized", ours), ("BF16", stock)):
        after = tokenizer.decode(run.tokens[same : same + 24])
        line = f"  {name:>9}: …{escape(str(before))}[bold]▸{escape(str(after))}[/bold]…"
        output.print(line.replace("\n", " "), highlight=False)


def _as_dict(name: str, memory: MemoryReport, ours: Generation, stock: Generation | None) -> dict[str, Any]:
    result = {
        "cache": name,
        **ours.as_dict(),
        "bytes_held": memory.total,
        "bytes_bf16": memory.bf16,
        "bytes_by_part": dict(memory.parts),
        "key_bits_codes": memory.key_bits_codes,
        "key_bits": memory.key_bits,
        "value_bits_codes": memory.value_bits_codes,
        "value_bits": memory.value_bits,
        "bits": memory.bits,
    }
    if stock is not None:
        result["compare"] = {**stock.as_dict(), "common_prefix_tokens": ours.common_prefix(stock)}
    return result
