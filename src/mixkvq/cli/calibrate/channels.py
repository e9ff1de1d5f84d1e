"""``mixkvq calibrate channels``: key channels that are promoted in every block of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from mixkvq.calibrate.channels import check_base, frozen_channels, mean_saliences
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.layers import with_layers
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, check_out, compare, write
from mixkvq.cli.calibrate.subject import load_subject
from mixkvq.cli.common import CacheHelp, DeviceOption, ModelOption, TextOption, WindowsOption, clean_exit, progress
from mixkvq.cli.loading import check_windows
from mixkvq.config import MixKVQConfig


def channels(
    out: OutArgument,
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "default",
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 2,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """Freeze which key channels of each head get 4 bits, by their mean salience over a text."""
    with clean_exit():
        check_out(out, text=text)
        base = MixKVQConfig.parse(cache)
        check_base(base)
        check_windows(window, count, base)
        subject = load_subject(model, dtype, device, text, window, count)
        with progress() as bar:
            task = bar.add_task("saliences", total=len(subject.searched))
            saliences = mean_saliences(subject.model, subject.searched, base, lambda: bar.advance(task))
        config = with_layers(base, frozen_channels(saliences, base), subject.model)
        about = {"cache": cache, **subject.about}
        judge = subject.judge(Trials(None, about))
        write(
            out, subject, Calibration(config, "channels", about, compare(cache, judge, base, config, "chosen by block"))
        )
