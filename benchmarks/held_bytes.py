"""Bytes that a cache holds of one sequence, beside those of BF16, after prompts of some lengths.

From the repository's root, in seconds on a CPU::

    python benchmarks/held_bytes.py qwen3-8b default 214 1023 2047

The model has the layers and heads of the shape and is narrow otherwise, as bytes of a cache depend on nothing else.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

from mixkvq import MixKVQCache
from mixkvq.adapters.transformers import NAME
from mixkvq.bench.shapes import SHAPES


def main() -> None:
    """The command line."""
    shape, cache_name, *lengths = sys.argv[1:]
    config = SHAPES[shape]()
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 64, 128
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=NAME).eval()
    print(f"| tokens in the cache | `{cache_name}` holds | BF16 holds | |\n| --- | --- | --- | --- |")
    for length in map(int, lengths):
        cache = MixKVQCache(model.config, cache_name)
        with torch.inference_mode():
            model(torch.randint(128, (1, length)), past_key_values=cache)
        held = cache.memory()
        mega, exact = held.total / 1e6, held.bf16 / 1e6
        print(f"| {length:,} | {mega:.0f} MB | {exact:.0f} MB | {exact / mega:.1f} times less |")


if __name__ == "__main__":
    main()
