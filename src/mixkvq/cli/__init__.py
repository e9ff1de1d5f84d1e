"""The command line: ``mixkvq generate | fidelity | eval | retrieval | bench | caches | calibrate``."""

from __future__ import annotations

import typer

from mixkvq.cli.bench import bench
from mixkvq.cli.caches import caches
from mixkvq.cli.calibrate import calibrate
from mixkvq.cli.eval import evaluation
from mixkvq.cli.fidelity import fidelity
from mixkvq.cli.generate import generate
from mixkvq.cli.retrieval import retrieval

app = typer.Typer(
    name="mixkvq",
    help="A KV cache of 2 to 3 bits for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(fidelity)
app.add_typer(evaluation, name="eval")
app.command()(retrieval)
app.add_typer(bench, name="bench")
app.command()(caches)
app.add_typer(calibrate, name="calibrate")


def main() -> None:
    """Entry point of the ``mixkvq`` command."""
    app()
