"""``mixkvq calibrate thresholds``: what the paper's tiers begin at, for a model."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from mixkvq.bench.environment import environment
from mixkvq.calibrate.thresholds import thresholds_for_bits
from mixkvq.cli.calibrate.common import DtypeOption
from mixkvq.cli.common import (
    DeviceOption,
    JsonOption,
    ModelOption,
    TextOption,
    WindowsOption,
    check_writable,
    clean_exit,
    load_model,
    output,
    parse_dtype,
    progress,
    write_json,
)
from mixkvq.evaluate.texts import windows
from mixkvq.models import DEFAULT_MODEL


def thresholds(
    bits: Annotated[float, typer.Option(help="Mean code bits of a key channel.")] = 2.3,
    bf16_share: Annotated[float, typer.Option(help="Share of channels to leave in BF16.")] = 0.01,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 4,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Thresholds of the paper's tiers at which the `paper` cache spends the given bits, from quantiles of saliences."""
    with clean_exit():
        check_writable(json_file)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        tokens = windows(tokenizer, text or [None], window, count)
        with progress() as bar:
            task = bar.add_task("reading", total=len(tokens))
            found = thresholds_for_bits(network, tokens, bits, bf16_share, lambda: bar.advance(task))
        output.print(f"paper:tau_bf16={found.tau_bf16:.4g},tau_uint4={found.tau_uint4:.4g}", soft_wrap=True)
        about = {"model": model or DEFAULT_MODEL, "bits": found.bits, **environment()}
        write_json(json_file, {**dataclasses.asdict(found), **about})
