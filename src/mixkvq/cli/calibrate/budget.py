"""``mixkvq calibrate budget``: settings by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer
from transformers import PreTrainedModel

from mixkvq.calibrate import fingerprint
from mixkvq.calibrate.allocation import SOLVER
from mixkvq.calibrate.budget import Text, check_base, measure_menu
from mixkvq.calibrate.errors import CalibrationError, needed
from mixkvq.calibrate.examiner import Examiner
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.layers import packed_memory
from mixkvq.calibrate.menu import Choice, Menu, Sizes, smallest
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import (
    DtypeOption,
    OutArgument,
    SeedOption,
    TrialsOption,
    check_out,
    compare,
    held_out,
    kept,
    write,
)
from mixkvq.cli.calibrate.exam import BatchOption, DataDirOption, NewTokensOption, about_exam, exam
from mixkvq.cli.calibrate.subject import Subject, load_subject
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    ModelOption,
    ReasonerOption,
    TextOption,
    WindowsOption,
    clean_exit,
    output,
    progress,
    say,
)
from mixkvq.cli.loading import check_reasoner, check_windows, reasoner_adapter
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import fidelity as measure
from mixkvq.evaluate.chains import encode
from mixkvq.evaluate.likelihood import pieces
from mixkvq.evaluate.problems import problem_set

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
    seed: SeedOption = 0,
    trials: TrialsOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """The one to begin with: which layers' keys and values earn more bits, so that all are better at the same size."""
    with clean_exit(), kept(trials):
        check_out(out, trials=trials, text=text)
        needed(SOLVER)
        base = MixKVQConfig.parse(cache)
        check_base(base)
        goal = Goal(bits, kl, lost)
        if (lost is None) != (problems is None):
            raise CalibrationError("--lost and --problems go together: so many points, of so many problems.")
        check_reasoner(reasoner, "calibrate on")
        check_windows(window, count, base)
        scored = exam(problems, data_dir, batch, max_new_tokens)
        merged = reasoner_adapter(adapter, model) if reasoner else None
        subject = load_subject(model, dtype, device, text, window, count, adapter=merged)
        sizes = Sizes.of(subject.model, base, subject.searched[0], exact or ())
        goal.check(sizes)
        texts = _texts(subject, base, reasoner)
        measured = {
            "config": base.as_dict(),
            **subject.data,
            "reasoner": reasoner,
            "chains": fingerprint.of_tokens(text.tokens for text in texts[len(subject.searched) :]),
            "seed": seed,
            **about_exam(scored),
            "options": {"keys": sizes.key_options, "values": sizes.value_options},
        }
        journal = Trials(trials, measured)
        menu = _measured(subject.model, base, texts, sizes, journal, seed)
        judge = subject.judge(journal)
        if goal.kl is not None:
            choice, _ = smallest(menu, goal.kl, lambda it: _checked(it, judge, base)["kl"])
        elif goal.lost is not None and scored is not None:
            examiner = scored.examiner(subject.model, subject.tokenizer, model, dtype, journal)
            choice, _ = smallest(menu, goal.lost, _lost_points(examiner, base), "the lost points")
        else:
            spent = packed_memory(subject.model, base, subject.searched[0]).bits
            choice = menu.choose(spent if goal.bits is None else goal.bits)
        config = choice.config(base, subject.model)
        compared = compare(cache, judge, base, config)
        results = {**compared, "predicted": choice.predicted, "menu": dataclasses.asdict(menu)}
        write(out, subject, Calibration(config, "budget", {"cache": cache, **subject.names, **measured}, results))


@dataclass(frozen=True)
class Goal:
    """What to spend, or how little to lose: at most one of these, and without any what the cache spends."""

    bits: float | None
    kl: float | None
    lost: float | None

    def __post_init__(self) -> None:
        if sum(goal is not None for goal in (self.bits, self.kl, self.lost)) > 1:
            raise CalibrationError("Give one of --bits, --kl and --lost.")
        if self.kl is not None and not (math.isfinite(self.kl) and self.kl > 0):
            raise CalibrationError(f"--kl {self.kl:g}: a cache of fewer bits has a KL above 0.")
        if self.lost is not None and not (math.isfinite(self.lost) and self.lost >= 0):
            raise CalibrationError(f"--lost {self.lost:g}: lose no points, or some.")

    def check(self, sizes: Sizes) -> None:
        """Complain about bits that the options do not come to, before anything is measured."""
        if self.bits is None:
            return
        sizes.check(self.bits)
        if self.bits > sizes.ceiling:
            say(f"Layers have at most {sizes.ceiling:.2f} bits, fewer than {self.bits:g}.")


def _checked(choice: Choice, judge: Judge, base: MixKVQConfig) -> dict[str, float]:
    return held_out(judge, f"{choice.bits:.3f} bits", choice.config(base, judge.model))


def _lost_points(examiner: Examiner, base: MixKVQConfig) -> Callable[[Choice], float]:
    """How many points of right answers a choice loses."""
    count = len(examiner.run.task.questions)

    def right(config: MixKVQConfig, what: str) -> float:
        with progress() as bar:
            task = bar.add_task(f"answers with {what}", total=count)
            return examiner(config, lambda done: bar.update(task, completed=done))

    full = right(MixKVQConfig.preset("bf16"), "full precision")
    output.print(f"{full:.1%} of {count} problems are right in full precision")
    if not full:
        raise CalibrationError(
            f"None of {count} problems is answered right in full precision: there is nothing to lose. Ask more of "
            "them, allow longer answers (--max-new-tokens), or use --kl."
        )
    return lambda it: 100 * (full - right(it.config(base, examiner.run.model), f"{it.bits:.3f} bits"))


def _measured(
    model: PreTrainedModel, base: MixKVQConfig, texts: list[Text], sizes: Sizes, journal: Trials, seed: int
) -> Menu:
    """What every option costs, with a progress bar."""
    with progress() as bar:
        task = bar.add_task("gradients", total=len(texts) * (1 + len(sizes.key_options)))
        return measure_menu(
            model,
            base,
            texts,
            sizes,
            journal,
            seed=seed,
            advance=lambda what: bar.update(task, advance=1, description=what),
        )


def _texts(subject: Subject, base: MixKVQConfig, count: int) -> list[Text]:
    """Windows, and after them right chains of so many problems, which together count as much as the windows."""
    bounds = measure.appends(subject.searched.shape[1], base)
    windows = [Text(f"window {i}", each, bounds, measure.WARM_UP) for i, each in enumerate(subject.searched)]
    chains = [encode(subject.tokenizer, problem) for problem in problem_set(count, split=SPLIT)]
    weight = len(windows) / max(count, 1)
    return windows + [
        Text(
            f"chain {i}", chain.tokens[:-1], pieces(chain.prompt, len(chain.tokens) - 1, base), chain.prompt - 1, weight
        )
        for i, chain in enumerate(chains)
    ]
