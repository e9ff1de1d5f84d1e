"""``mixkvq calibrate budget``: settings by layer."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.calibrate.budget import (
    Choice,
    Menu,
    Text,
    check_base,
    check_exact,
    key_options,
    measure_menu,
    smallest,
    value_options,
)
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import (
    DtypeOption,
    OutArgument,
    TrialsOption,
    check_window,
    held_out,
    kept,
    searched_and_judged,
    write,
)
from mixkvq.cli.calibrate.exam import BatchOption, DataDirOption, NewTokensOption, about_exam, exam
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    ModelOption,
    ReasonerOption,
    TextOption,
    WindowsOption,
    check_reasoner,
    check_writable,
    clean_exit,
    inputs,
    load_model,
    output,
    parse_dtype,
    progress,
    reasoner_adapter,
)
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import fidelity as measure
from mixkvq.evaluate.chains import encode
from mixkvq.evaluate.likelihood import pieces
from mixkvq.evaluate.problems import problem_set
from mixkvq.models import merge_adapter
from mixkvq.report.tables import calibration_table

#: Problems whose chains are calibrated on; others judge what was found.
SPLIT = "calibration"


def budget(
    out: OutArgument,
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "default",
    bits: Annotated[
        float | None, typer.Option(help="Mean honest bits to spend.", show_default="what the cache spends")
    ] = None,
    kl: Annotated[
        float | None, typer.Option(help="Instead of bits: spend as few as keep the KL within so many nats per token.")
    ] = None,
    lost: Annotated[
        float | None,
        typer.Option(help="Instead of bits: as few as lose at most so many points of right answers to --problems."),
    ] = None,
    problems: Annotated[
        int | None, typer.Option(help="Training problems of GSM8K for --lost.", show_default="none")
    ] = None,
    data_dir: DataDirOption = None,
    batch: BatchOption = 32,
    max_new_tokens: NewTokensOption = None,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 2,
    reasoner: Annotated[
        int,
        typer.Option(help="Also calibrate on the right chains of so many problems, by a model that solves them."),
    ] = 0,
    adapter: ReasonerOption = None,
    exact: Annotated[
        list[int] | None,
        typer.Option(
            help="A layer whose keys get 8 bits, whatever is predicted; may be repeated.", show_default="none"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the labels whose gradients are taken.")] = 0,
    trials: TrialsOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """Which layers' keys and values earn more bits: settings by layer, better at the same size."""
    with clean_exit(), kept(trials):
        check_writable(out)
        base = MixKVQConfig.parse(cache)
        check_base(base)
        if sum(goal is not None for goal in (bits, kl, lost)) > 1:
            raise CalibrationError("Give one of --bits, --kl and --lost.")
        if (lost is None) != (problems is None):
            raise CalibrationError("--lost and --problems go together: so many points, of so many problems.")
        check_reasoner(reasoner, "calibrate on")
        scored = exam(problems, data_dir, batch, max_new_tokens)
        check_window(window)
        merged = reasoner_adapter(adapter, model) if reasoner else None
        about = {
            "cache": cache,
            "config": base.as_dict(),
            **inputs(model, text),
            "adapter": None if merged is None else merged.name,
            "dtype": dtype,
            "window": window,
            "windows": count,
            "reasoner": reasoner,
            "seed": seed,
            **about_exam(problems, data_dir, batch, max_new_tokens),
            "options": {"keys": key_options(base), "values": value_options()},
        }
        journal = Trials(trials, about)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        check_exact(exact or (), quantized_layers(network))  # before minutes of measuring
        searched, judged = searched_and_judged(tokenizer, text, window, count)
        if merged is not None:
            network = merge_adapter(network, merged)
        texts = _texts(searched, _chains(tokenizer, base, reasoner, len(searched)), base)
        menu = dataclasses.replace(_measured(network, base, texts, journal, seed), exact=tuple(exact or ()))
        judge = Judge(network, judged, journal, "held out")
        plain = held_out(judge, "uniform", base)

        def checked(it: Choice) -> dict[str, float]:
            return held_out(judge, f"{it.bits:.3f} bits", it.config(base, network))

        if kl is not None:
            choice, _ = smallest(menu, kl, lambda it: checked(it)["kl"])
        elif lost is not None and scored is not None:
            right = scored.examiner(network, tokenizer, model, dtype, journal)
            full = right(MixKVQConfig.preset("bf16"))
            output.print(f"{full:.1%} of {problems} problems are right in full precision")
            if not full:
                raise CalibrationError(
                    f"None of {problems} problems is answered right in full precision: there is nothing to lose. Ask "
                    "more of them, allow longer answers (--max-new-tokens), or use --kl."
                )
            choice, _ = smallest(
                menu, lost, lambda it: 100 * (full - right(it.config(base, network))), "the lost points"
            )
        else:
            choice = menu.choose(plain["bits"] if bits is None else bits)
        found = checked(choice)
        results = {
            "uniform": plain,
            "found": found,
            "predicted": choice.predicted,
            "menu": dataclasses.asdict(menu),
        }
        output.print(calibration_table(cache, plain, found))
        write(out, Calibration(choice.config(base, network), "budget", about, results))


def _texts(searched: Tensor, chains: list[Text], base: MixKVQConfig) -> list[Text]:
    """Windows, and after them chains."""
    bounds = measure.appends(searched.shape[1], base)
    return [*(Text(f"window {i}", each, bounds, measure.WARM_UP) for i, each in enumerate(searched)), *chains]


def _measured(model: PreTrainedModel, base: MixKVQConfig, texts: list[Text], journal: Trials, seed: int) -> Menu:
    """What every option costs, with a progress bar."""
    with progress() as bar:
        task = bar.add_task("gradients", total=len(texts) * (1 + len(key_options(base))))
        return measure_menu(
            model,
            base,
            texts,
            journal,
            seed=seed,
            advance=lambda what: bar.update(task, advance=1, description=what),
        )


def _chains(tokenizer: PreTrainedTokenizerBase, base: MixKVQConfig, count: int, windows: int) -> list[Text]:
    """Right chains of so many problems, which together count as much as so many windows."""
    weight = windows / max(count, 1)
    chains = [encode(tokenizer, problem) for problem in problem_set(count, split=SPLIT)]
    return [
        Text(
            f"chain {i}", chain.tokens[:-1], pieces(chain.prompt, len(chain.tokens) - 1, base), chain.prompt - 1, weight
        )
        for i, chain in enumerate(chains)
    ]
