"""``mixkvq calibrate kvtuner``: KVTuner's search for each layer's pair of widths."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from mixkvq.calibrate.errors import needed
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.kvtuner import (
    SIMILAR,
    Cluster,
    PairErrors,
    check_floor,
    cluster_layers,
    first_choices,
    layer_fields,
    mean_bits,
    output_errors,
)
from mixkvq.calibrate.layers import with_layers
from mixkvq.calibrate.search import Params, Point, best_within, check_tries, front, nsga2, search
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import (
    DtypeOption,
    OutArgument,
    PlotOption,
    SeedOption,
    TrialsOption,
    check_out,
    compare,
    draw_front,
    kept,
    write,
)
from mixkvq.cli.calibrate.subject import Subject, load_subject
from mixkvq.cli.common import DeviceOption, ModelOption, TextOption, WindowsOption, clean_exit, output, progress
from mixkvq.cli.files import check_plot
from mixkvq.cli.loading import check_windows
from mixkvq.config import MixKVQConfig
from mixkvq.policies.kvtuner import PAIRS
from mixkvq.report.fidelity import BITS, KL
from mixkvq.report.tables import front_table

#: Trials of a generation.
POPULATION = 16


def kvtuner(
    out: OutArgument,
    bits: Annotated[float, typer.Option(help="Mean honest bits of what is written, at most.")] = 4.25,
    tries: Annotated[int, typer.Option(help="Configurations to try.")] = 100,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    count: WindowsOption = 1,
    seed: SeedOption = 0,
    trials: TrialsOption = None,
    plot: PlotOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """KVTuner's search: pairs of key and value bits for clusters of layers, by NSGA-II."""
    with clean_exit(), kept(trials):
        check_out(out, trials=trials, text=text, more=[plot])
        for package in ("optuna", "scipy"):
            needed(package)
        check_plot(plot)
        check_tries(tries)
        base = MixKVQConfig.preset("kvtuner")
        check_windows(window, count, base)
        subject = load_subject(model, dtype, device, text, window, count)
        network, journal = subject.model, Trials(trials, subject.data)
        errors = _errors(subject, base, journal)
        check_floor(errors, bits)
        clusters = cluster_layers(errors)
        judge = Judge(network, subject.searched, journal, "searched", keep=True)
        first = first_choices(clusters, mean_bits(errors), bits)
        points = _search(network, base, clusters, judge, first, seed, tries)
        found = best_within(points, bits)
        names = {_name(point): (point.bits, point.loss) for point in points}
        output.print(_clusters_line(clusters))
        output.print(
            front_table("Pareto front", "pairs of the clusters", {_name(p): p for p in front(points)}, "KL", BITS)
        )
        draw_front(plot, names, BITS, KL, log_y=True, chosen=_name(found), limit=bits)
        config = _config(network, base, clusters, found.params)
        results = {
            "pairs": PAIRS,
            "layers": {layer: dataclasses.asdict(each) for layer, each in errors.items()},
            "clusters": [dataclasses.asdict(cluster) for cluster in clusters],
            "front": [point.as_dict() for point in front(points)],
            **compare("kvtuner", subject.judge(journal), base, config),
        }
        search_of = {"bits": bits, "tries": tries, "seed": seed, "population": POPULATION, "similar": SIMILAR}
        write(out, subject, Calibration(config, "kvtuner", {**subject.about, **search_of}, results))


def _errors(subject: Subject, base: MixKVQConfig, journal: Trials) -> dict[int, PairErrors]:
    """Of single layers, with a progress bar."""

    def measure() -> dict[str, Any]:
        with progress() as bar:
            task = bar.add_task("errors of single layers", total=len(subject.searched))
            found = output_errors(subject.model, subject.searched, base, lambda: bar.advance(task))
        return {str(layer): dataclasses.asdict(each) for layer, each in found.items()}

    kept = journal.once("errors of single layers", measure)
    return {int(layer): PairErrors(tuple(each["errors"]), tuple(each["bits"])) for layer, each in kept.items()}


def _search(
    model: PreTrainedModel,
    base: MixKVQConfig,
    clusters: list[Cluster],
    judge: Judge,
    first: list[tuple[int, ...]],
    seed: int,
    tries: int,
) -> list[Point]:
    def measure(params: Params) -> tuple[float, float]:
        row = judge(_config(model, base, clusters, params))
        return row["bits"], row["kl"]

    sampler = nsga2(seed, POPULATION)
    with progress() as bar:
        task = bar.add_task("searching", total=tries)
        return search(
            sampler,
            _space(clusters),
            measure,
            tries,
            first=map(_params, first),
            advance=lambda: bar.advance(task),
        )


def _space(clusters: list[Cluster]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution

    return {f"cluster {i}": CategoricalDistribution(list(cluster.pairs)) for i, cluster in enumerate(clusters)}


def _params(choice: tuple[int, ...]) -> dict[str, int]:
    return {f"cluster {i}": pair for i, pair in enumerate(choice)}


def _config(model: PreTrainedModel, base: MixKVQConfig, clusters: list[Cluster], params: Params) -> MixKVQConfig:
    chosen = [params[f"cluster {i}"] for i in range(len(clusters))]
    return with_layers(base, layer_fields(clusters, chosen), model)


def _name(point: Point) -> str:
    """Pairs as the paper writes them: 8/4 4/4 2/2."""
    return " ".join("{}/{}".format(*PAIRS[pair]) for pair in point.params.values())


def _clusters_line(clusters: list[Cluster]) -> str:
    return "; ".join(f"cluster {i}: layers {', '.join(map(str, cluster.layers))}" for i, cluster in enumerate(clusters))
