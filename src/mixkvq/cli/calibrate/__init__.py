"""``mixkvq calibrate``: find a configuration for a model."""

from __future__ import annotations

import typer

from mixkvq.cli.calibrate.budget import budget
from mixkvq.cli.calibrate.channels import channels
from mixkvq.cli.calibrate.kvmix import kvmix
from mixkvq.cli.calibrate.kvquant import kvquant
from mixkvq.cli.calibrate.kvtuner import kvtuner
from mixkvq.cli.calibrate.pm_kvq import pm_kvq
from mixkvq.cli.calibrate.thresholds import thresholds

calibrate = typer.Typer(help="Find a configuration for a model.", no_args_is_help=True)
for command in (budget, thresholds, channels, kvmix, kvtuner, kvquant, pm_kvq):
    calibrate.command()(command)
