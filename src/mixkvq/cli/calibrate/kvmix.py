"""``mixkvq calibrate kvmix``: KVmix's profile of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.kvmix import gradient_norms
from mixkvq.calibrate.layers import with_layers
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, write
from mixkvq.cli.common import (
    DeviceOption,
    ModelOption,
    TextOption,
    check_writable,
    clean_exit,
    inputs,
    load_model,
    output,
    parse_dtype,
    progress,
)
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.texts import windows
from mixkvq.policies.kvmix import allocate_layers


def kvmix(
    out: OutArgument,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    count: Annotated[int, typer.Option("--windows", help="Prompts of each text.")] = 24,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """KVmix's profile: the layers with the largest gradients get 3-bit keys and 4-bit values, the others 2 bits."""
    with clean_exit():
        check_writable(out)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        prompts = windows(tokenizer, text or [None], window, count)
        with progress() as bar:
            task = bar.add_task("gradients", total=len(prompts))
            keys, values = gradient_norms(network, prompts, lambda: bar.advance(task))
        fields = allocate_layers(keys, values)
        config = with_layers(MixKVQConfig.preset("kvmix"), fields, network)
        about = {**inputs(model, text), "window": window, "windows": count}
        for name, bits in (("keys of 3 bits", "key_bits"), ("values of 4 bits", "value_bits")):
            output.print(f"{name}: layers {', '.join(str(i) for i, own in fields.items() if bits in own)}")
        write(out, Calibration(config, "kvmix", about, {"key_norms": keys, "value_norms": values}))
