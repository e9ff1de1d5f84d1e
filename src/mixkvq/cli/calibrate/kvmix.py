"""``mixkvq calibrate kvmix``: KVmix's profile of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.kvmix import gradient_norms
from mixkvq.calibrate.layers import with_layers
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, TrialsOption, check_out, compare, kept, write
from mixkvq.cli.calibrate.subject import load_subject
from mixkvq.cli.common import DeviceOption, ModelOption, TextOption, clean_exit, output, progress
from mixkvq.cli.loading import check_windows
from mixkvq.config import MixKVQConfig
from mixkvq.policies.kvmix import allocate_layers


def kvmix(
    out: OutArgument,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    count: Annotated[int, typer.Option("--windows", help="Prompts of each text.")] = 24,
    trials: TrialsOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """KVmix's profile: the layers with the largest gradients get 3-bit keys and 4-bit values, the others 2 bits."""
    with clean_exit(), kept(trials):
        check_out(out, trials=trials, text=text)
        base = MixKVQConfig.preset("kvmix")
        check_windows(window, count, base)
        subject = load_subject(model, dtype, device, text, window, count, in_turns=False)
        journal = Trials(trials, subject.data)
        with progress() as bar:
            task = bar.add_task("gradients", total=len(subject.searched))
            keys, values = gradient_norms(subject.model, subject.searched, journal, lambda: bar.advance(task))
        fields = allocate_layers(keys, values)
        config = with_layers(base, fields, subject.model)
        for name, bits in (("keys of 3 bits", "key_bits"), ("values of 4 bits", "value_bits")):
            output.print(f"{name}: layers {', '.join(str(i) for i, own in fields.items() if bits in own)}")
        results = {"key_norms": keys, "value_norms": values, **compare("kvmix", subject.judge(journal), base, config)}
        write(out, subject, Calibration(config, "kvmix", subject.about, results))
