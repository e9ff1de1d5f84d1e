"""Draw the loss of one training after the other.

python recipes/reasoner/curve.py recipes/reasoner/adapter/training_first.json \
    recipes/reasoner/adapter/training_second.json recipes/reasoner/adapter/training.json \
    --out docs/images/reasoner-training.png
"""

from __future__ import annotations

import argparse
import json
from itertools import accumulate, cycle
from pathlib import Path

from mixkvq.report.figures import COLOURS, furnish, new_figure, save

#: Steps whose mean is drawn.
WINDOW = 20


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("trainings", type=Path, nargs="+", help="files that train.py wrote, in their order")
    parser.add_argument("--out", type=Path, default=Path("training.png"), help="a PNG or SVG")
    arguments = parser.parse_args()
    figure = new_figure((6.4, 3.2))
    axes = figure.add_subplot()
    before = 0.0
    for file, colour in zip(arguments.trainings, cycle(COLOURS), strict=False):
        training = json.loads(file.read_text())
        losses, per_step = training["loss"], training["tokens"] / len(training["loss"])
        sums = [0.0, *accumulate(losses)]
        steps = range(WINDOW, len(losses) + 1)
        means = [(sums[step] - sums[step - WINDOW]) / WINDOW for step in steps]
        rate = training["arguments"]["learning_rate"]
        axes.plot(
            [before + step * per_step / 1e6 for step in steps], means, color=colour, label=f"learning rate {rate}"
        )
        before += training["tokens"] / 1e6
    axes.set_yscale("log")
    furnish(axes, "million tokens", f"loss, mean of {WINDOW} steps")
    axes.legend(frameon=False)
    save(figure, arguments.out)


if __name__ == "__main__":
    main()
