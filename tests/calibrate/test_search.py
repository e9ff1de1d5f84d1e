"""Searches: what they find, that they repeat themselves and go on after an interruption, and judges that ask once."""

from pathlib import Path

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution

from chats import Scripted, chat_tokenizer
from mixkvq import MixKVQConfig
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.examiner import Examiner
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.search import Point, best_within, front, nsga2, search, tpe
from mixkvq.calibrate.trials import Trials
from mixkvq.evaluate.answers import Settings
from mixkvq.evaluate.fidelity import fidelity
from mixkvq.evaluate.runner import Run
from mixkvq.evaluate.tasks import Question, Task
from mixkvq.report.tables import front_table
from models import VOCABULARY, tiny_model

SPACE = {name: CategoricalDistribution([2, 4, 8]) for name in "abc"}
SAMPLERS = {"nsga2": lambda: nsga2(seed=3, population=8), "tpe": lambda: tpe(seed=3)}


def measure(params) -> tuple[float, float]:
    """Bits matter most in ``a``."""
    bits = sum(params.values()) / 3
    return bits, sum(weight / 4 ** params[name] for name, weight in zip("abc", (100, 10, 1), strict=True))


POINTS = [Point({}, 3.0, 0.5), Point({}, 2.0, 0.9), Point({}, 2.5, 0.95), Point({}, 4.0, 0.5), Point({}, 2.2, 0.6)]


def test_the_front_and_the_best_within_some_bits():
    assert front(POINTS) == [POINTS[1], POINTS[4], POINTS[0]]
    assert best_within(POINTS, 2.9) == POINTS[4]
    assert best_within(POINTS, 2.0) == POINTS[1]
    assert best_within(POINTS, 9) == POINTS[0]
    with pytest.raises(
        CalibrationError, match=r"None of 5 points that were tried takes at most 1.5 bits: the fewest wer"
    ):
        best_within(POINTS, 1.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_finds_where_bits_matter(sampler: str):
    uniform = [dict.fromkeys("abc", bits) for bits in (2, 4, 8)]
    points = search(SAMPLERS[sampler](), SPACE, measure, 60, first=uniform)
    assert [point.params for point in points[:3]] == uniform
    assert best_within(points, 10 / 3).params == {"a": 4, "b": 4, "c": 2}
    assert points == search(SAMPLERS[sampler](), SPACE, measure, 60, first=uniform)
    assert points[:20] == search(SAMPLERS[sampler](), SPACE, measure, 20, first=uniform)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_ends_as_it_would_have(sampler: str, tmp_path: Path):
    space = {**SPACE, "share": FloatDistribution(0, 1)}
    asked = []

    def run(stop: int | None, path: Path | None) -> list[Point]:
        trials = Trials(path, {"text": "a"})

        def kept(params) -> tuple[float, float]:
            def once() -> dict[str, float]:
                if len(asked) == stop:
                    raise KeyboardInterrupt
                asked.append(params)
                bits, loss = measure({name: params[name] for name in "abc"})
                return {"bits": bits, "loss": loss + params["share"]}

            found = trials.once(str(sorted(params.items())), once)
            return found["bits"], found["loss"]

        return search(SAMPLERS[sampler](), space, kept, 25)

    with pytest.raises(KeyboardInterrupt):
        run(11, tmp_path / "trials")
    found = run(None, tmp_path / "trials")
    assert len(asked) == len({str(point.params) for point in found})  # nothing was measured twice
    assert found == run(None, None)


def test_nothing_to_try():
    with pytest.raises(CalibrationError, match="--tries 0: try at least one"):
        search(tpe(seed=0), SPACE, measure, 0)


def test_a_judge_measures_a_configuration_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, windows = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 200))
    config = MixKVQConfig.preset("kivi-2", residual_length=32)
    row = fidelity(model, windows, {"": config})[0]
    wanted = {"kl": row.kl, "bits": row.bits, "perplexity": row.perplexity, "key_bits_codes": 2, "value_bits_codes": 2}
    passes = []
    journal = tmp_path / "trials"
    for keep in (False, True):
        judge = Judge(model, windows, Trials(journal, {}), f"keep {keep}", keep=keep)
        assert judge(config, lambda: passes.append(1)) == wanted
        assert judge(config, lambda: passes.append(1)) == wanted
    assert len(passes) == 4 + 4  # full precision and the cache, two windows each
    again = Judge(model, windows, Trials(journal, {}), "keep True")
    monkeypatch.setattr("mixkvq.calibrate.judge.fidelity", None)
    assert again(config) == wanted


class Names(Task):
    """Asks for its question's name."""

    name = "names"

    def grade(self, question: Question, text: str) -> bool:
        return text == question.right

    def room(self, chain_tokens: int | None) -> int:
        return 5


def test_an_examiner_counts_right_answers_once():
    model = Scripted(lambda prompt: "b" if prompt == "b" else "c")
    task = Names([Question(name, name, name) for name in "abc"])
    run = Run(model, chat_tokenizer(), task, Settings("m", None, "float32", None, 0.0, 1.0, 0), batch=3)
    examiner, counts = Examiner(run, Trials(None, {})), []
    assert examiner(MixKVQConfig.preset("kivi-2"), counts.append) == pytest.approx(2 / 3)
    assert examiner(MixKVQConfig.preset("kivi-2"), counts.append) == pytest.approx(2 / 3)
    assert len(model.calls) == 1
    assert counts == [0, 3]


def test_tables_say_which_bits_they_have():
    points = {"half": Point({"share": 0.5}, 2.4, 0.1)}
    unnamed, named = front_table("", "share", points, "KL"), front_table("", "share", points, "KL", bits="code bits")
    assert [column.header for column in unnamed.columns] == ["share", "bits", "KL"]
    assert [column.header for column in named.columns] == ["share", "code bits", "KL"]
