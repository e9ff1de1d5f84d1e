"""``mixkvq bench``: what a cache costs in time and bytes."""

from __future__ import annotations

import typer

from mixkvq.cli.bench.decode import decode
from mixkvq.cli.bench.kernel import kernel
from mixkvq.cli.bench.model import capacity, generate, prefill
from mixkvq.cli.bench.plot import plot

bench = typer.Typer(help="Measure time and bytes.", no_args_is_help=True)
for command in (decode, kernel, generate, capacity, prefill, plot):
    bench.command()(command)
