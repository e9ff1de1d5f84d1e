"""Answers in batches: right, wrong and endless ones, both kinds of cache, and files to go on with."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch._dynamo
from transformers import CompileConfig

from chats import Scripted, chat_tokenizer
from mixkvq import MixKVQConfig
from mixkvq.evaluate.accuracy import accuracies
from mixkvq.evaluate.answers import Answer, AnswerFile, Settings
from mixkvq.evaluate.chains import ChatTemplateError
from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.runner import Run, batch_seed, end_tokens
from mixkvq.evaluate.tasks import Question, Reasoner, Task
from models import tiny_model

SETTINGS = Settings("tiny", None, "float32", None, 0.0, 1.0, 0)
CACHES = {name: MixKVQConfig.parse(name) for name in ("bf16", "default:residual_length=32,key_group=32")}
ONE = {"default": MixKVQConfig.preset("default")}


class Echo(Task):
    """Asks for its question's name."""

    name = "echo"

    def __init__(self, lengths: list[int], samples: int = 1) -> None:
        super().__init__([Question(f"q{n}", "x" * n, f"q{n}") for n in lengths], samples=samples)

    def grade(self, question: Question, text: str) -> bool:
        return text == question.right

    def room(self, chain_tokens: int | None) -> int:
        return 12


def answers(run: Run, caches=ONE, path: Path | None = None) -> list[Answer]:
    file = AnswerFile(path)
    return run.answers(caches, file.of(run.task, caches, run.settings), file)


def run(model, task: Task, settings: Settings = SETTINGS, batch: int = 2, **options) -> Run:
    return Run(model, chat_tokenizer(), task, settings, batch=batch, **options)


def test_right_wrong_and_endless_answers():
    replies = {3: "q3", 1: "q7", 2: "q2"}
    model = Scripted(lambda prompt: replies[len(prompt)], ends=lambda prompt: prompt != "xx")
    found = {answer.question: answer for answer in answers(run(model, Echo([1, 2, 3])))}
    assert [found[f"q{n}"].correct for n in (1, 2, 3)] == [False, False, True]
    assert [found[f"q{n}"].finished for n in (1, 2, 3)] == [True, False, True]
    assert found["q3"].text == "q3"
    assert found["q3"].new_tokens == 3
    assert found["q2"].text == "q2" + "2" * 10
    assert found["q2"].new_tokens == 12
    assert found["q3"].exact is None
    assert model.calls == [["xxx", "xx"], ["x"]]


def test_a_row_is_cut_at_its_own_limit():
    """What an answer may take does not depend on the batch that it is written in."""

    class Uneven(Echo):
        def room(self, chain_tokens: int | None) -> int:
            return chain_tokens or 3

    task = Uneven([1])
    task.questions = [*task.questions, Question("long", "y", "abcdef", chain="abcdef")]
    first, second = answers(run(Scripted(lambda _: "abcdef"), task))
    assert (first.question, first.finished, first.exact, first.chain_tokens) == ("long", True, True, 7)
    assert (second.text, second.finished, second.new_tokens) == ("abc", False, 3)


def test_the_reasoner_is_graded_by_its_last_answer():
    task = Reasoner(3, longest=120)
    chains = {question.prompt: question.chain for question in task.questions}
    other = task.questions[1].prompt

    def reply(prompt: str) -> str:
        return "So it is.\nAnswer: 0\n" + chains[prompt] if prompt == other else chains[prompt]

    found = answers(run(Scripted(reply), task))
    assert all(answer.correct for answer in found)
    assert [answer.exact for answer in found] == [answer.right != task.questions[1].right for answer in found]
    row = accuracies(found, ONE)[0]
    assert (row.accuracy, row.exact, row.cut_off) == (1.0, pytest.approx(2 / 3), 0.0)
    assert set(row.families) == {question.family for question in task.questions}
    assert sum(group.questions for group in row.lengths.values()) == 3


def test_both_kinds_of_cache_write_the_same():
    task = Echo([5, 60, 41])  # the last one comes to the end of a block while it is answered
    settings = dataclasses.replace(SETTINGS, max_new_tokens=10)
    growing, fixed = (answers(run(tiny_model("llama"), task, settings, static=x), CACHES) for x in (False, True))
    assert len(growing) == 6
    assert [dataclasses.replace(x, bits=None) for x in growing] == [dataclasses.replace(x, bits=None) for x in fixed]
    assert {answer.bits for answer in growing if answer.cache == "bf16"} <= {None, 32.0}
    assert any(answer.bits is not None and answer.bits < 8 for answer in fixed)
    assert len({answer.text for answer in fixed}) > 2


def test_settings_by_layer_write_the_same_and_are_resumed(tmp_path: Path):
    own = CACHES["default:residual_length=32,key_group=32"].replace(layers=[{"budget": 3.5}, {"value_bits": 4}])
    settings = dataclasses.replace(SETTINGS, max_new_tokens=10)
    model, task, caches = tiny_model("llama"), Echo([5, 60, 41]), {"own": own}
    growing, fixed = (answers(run(model, task, settings, static=x), caches) for x in (False, True))
    assert [answer.text for answer in growing] == [answer.text for answer in fixed]
    first = answers(run(model, task, settings), caches, tmp_path / "answers.jsonl")
    assert answers(run(Scripted(lambda _: "other"), task, settings), caches, tmp_path / "answers.jsonl") == first
    changed = {"own": own.replace(layers=[{}, {}])}
    with pytest.raises(EvaluationError, match="layers"):
        answers(run(model, task, settings), changed, tmp_path / "answers.jsonl")


def test_all_batches_of_a_fixed_cache_have_the_same_rows():
    model = Scripted(lambda _: "no")
    assert len(answers(run(model, Echo([1, 2, 3]), batch=2, static=True))) == 3
    assert [len(call) for call in model.calls] == [2, 2]
    few = Scripted(lambda _: "no")
    answers(run(few, Echo([1, 2, 3]), batch=32, static=True))
    assert [len(call) for call in few.calls] == [3]


def test_the_habits_of_a_model_are_switched_off():
    model = Scripted(lambda _: "no")
    answers(run(model, Echo([1])))
    assert model.options["repetition_penalty"] is None
    assert model.options["do_sample"] is False
    answers(run(model, Echo([1]), dataclasses.replace(SETTINGS, temperature=0.7, top_p=0.9)))
    assert (model.options["temperature"], model.options["top_p"], model.options["top_k"]) == (0.7, 0.9, None)


def test_samples_are_repeatable_and_differ():
    settings = dataclasses.replace(SETTINGS, temperature=1.0, seed=3)
    task = Echo([4, 8], samples=2)
    first, again = (answers(run(tiny_model("llama"), task, settings, batch=4)) for _ in range(2))
    assert first == again
    assert len({answer.text for answer in first}) == 4
    other = answers(run(tiny_model("llama"), task, dataclasses.replace(settings, seed=4), batch=4))
    assert {answer.text for answer in other}.isdisjoint(answer.text for answer in first)


def test_seeds_of_batches():
    items = run(Scripted(str), Echo([1, 2], samples=2)).items
    assert batch_seed(0, items[:2]) != batch_seed(0, items[2:])
    assert batch_seed(0, items[:2]) != batch_seed(1, items[:2])
    assert 0 <= batch_seed(0, items) < 2**63


def test_end_tokens():
    model = Scripted(str)
    assert end_tokens(model, chat_tokenizer()) == [2, 1]
    model.generation_config.eos_token_id, before = [2, 77], model.generation_config.eos_token_id
    try:
        assert end_tokens(model, chat_tokenizer()) == [2, 77, 1]
    finally:
        model.generation_config.eos_token_id = before


def test_models_that_cannot_be_asked():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Run(Scripted(str), chat_tokenizer(None), Echo([1]), SETTINGS, batch=1)
    with pytest.raises(
        EvaluationError, match=r"Question q4090 has 4,\d+ tokens and leaves no room .* context of 4,096"
    ):
        run(Scripted(str), Echo([4090]))


def test_a_context_that_clips_answers():
    clipped = run(Scripted(str), Echo([4000, 4070, 4072], samples=2))
    template = len(clipped.items[-1].prompt) - 4000
    limits = {item.question.name: item.limit for item in clipped.items}
    assert limits == {"q4000": 12, "q4070": 26 - template, "q4072": 24 - template}
    assert clipped.clipped == 2  # questions, not answers


def test_a_right_answer_that_does_not_fit_is_refused():
    task = Echo([])
    task.questions = [Question("long", "x" * 4000, "", chain="c" * 90)]
    settings = dataclasses.replace(SETTINGS, max_new_tokens=91)
    message = r"Question long has 4,0\d+ tokens and its right answer takes 91, .* context of 4,096: .* with --longest"
    with pytest.raises(EvaluationError, match=message):
        run(Scripted(str), task, settings)
    few = run(Scripted(str), task, dataclasses.replace(SETTINGS, max_new_tokens=5))  # as the user wants it
    assert (few.items[0].limit, few.clipped) == (5, 0)


# Files


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path):
    path, task = tmp_path / "answers.jsonl", Echo([1, 2, 3, 4, 5])

    def interrupted(prompt: str) -> str:
        if len(prompt) == 2:
            raise KeyboardInterrupt
        return "q5"

    with pytest.raises(KeyboardInterrupt):
        answers(run(Scripted(interrupted), task), path=path)
    assert [json.loads(line)["question"] for line in path.read_text().splitlines()] == ["q5", "q4"]
    model = Scripted(lambda _: "q3")
    found = answers(run(model, task), path=path)
    assert model.calls == [["xxx", "xx"], ["x"]]
    assert {answer.question for answer in found if answer.correct} == {"q5", "q3"}
    assert AnswerFile(path).answers == found
    assert answers(run(Scripted(interrupted), task), path=path) == found  # nothing is asked


def test_a_line_that_was_not_written_to_its_end(tmp_path: Path):
    path, task = tmp_path / "answers.jsonl", Echo([1, 2, 3])
    whole = answers(run(Scripted(lambda _: "é"), task), path=path)
    content = path.read_bytes()
    for cut in (1, 30, len(content.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(content[:-cut])
        for _ in range(2):  # looking at it changes nothing
            assert AnswerFile(path).dropped
            assert len(AnswerFile(path).answers) == 2
            assert path.read_bytes() == content[:-cut]
        assert answers(run(Scripted(lambda _: "é"), task), path=path) == whole
        assert path.read_bytes() == content
        assert not AnswerFile(path).dropped
    file = AnswerFile(path)
    for one in whole[:2]:
        file.append([one])
    assert path.read_bytes() == content + "".join(one.line() for one in whole[:2]).encode()


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_samples_do_not_depend_on_an_interruption(tmp_path: Path, batch: int):
    path, task = tmp_path / "answers.jsonl", Echo([4, 8, 6], samples=2)
    settings = dataclasses.replace(SETTINGS, temperature=1.0, seed=3)
    whole = answers(run(tiny_model("llama"), task, settings, batch=batch), CACHES, path)
    lines = path.read_text().splitlines(keepends=True)
    for there in ([], lines[:1], lines[:5], lines[2:3] + lines[8:9], lines[:11], lines):
        path.write_text("".join(there))
        found = answers(run(tiny_model("llama"), task, settings, batch=batch), CACHES, path)
        assert len(found) == 12
        assert {answer.key: answer for answer in found} == {answer.key: answer for answer in whole}
        assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_only_batches_with_something_missing_are_asked(tmp_path: Path):
    path, task = tmp_path / "answers.jsonl", Echo([1, 2, 3, 4, 5])
    answers(run(Scripted(lambda _: "no"), task), path=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    model, counts = Scripted(lambda _: "no"), []
    again, file = run(model, task), AnswerFile(path)
    again.answers(ONE, file.of(task, ONE, SETTINGS), file, lambda _, count: counts.append(count))
    assert model.calls == [["xxx", "xx"]]
    assert counts == [4, 5]
    assert path.read_text() == "".join(lines[:2] + lines[3:] + lines[2:3])


def test_a_fixed_cache_has_room_for_the_batches_after_an_interruption(tmp_path: Path):
    """Batches that were cut anew could have both the longest prompt and the longest answer."""

    class Uneven(Echo):
        def room(self, chain_tokens: int | None) -> int:
            return chain_tokens or 4

    task, path = Uneven([100, 101]), tmp_path / "answers.jsonl"
    task.questions = [*task.questions, *(Question(name, name, "?", chain="c" * 90) for name in "ab")]
    caches = {"small": MixKVQConfig.parse("default:residual_length=16,key_group=16")}
    whole = answers(run(tiny_model("llama"), task, static=True), caches, path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    found = answers(run(tiny_model("llama"), task, static=True), caches, path)
    assert found == whole


def test_more_questions_samples_and_caches_are_added(tmp_path: Path):
    path, model = tmp_path / "answers.jsonl", Scripted(lambda _: "q1")
    answers(run(model, Echo([1])), path=path)
    found = answers(run(model, Echo([1, 2], samples=2)), {**ONE, **CACHES}, path)
    assert len(found) == len({answer.key for answer in found}) == 12
    assert len(AnswerFile(path).answers) == 12
    assert len(answers(run(model, Echo([2])), ONE, path)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, r"the options were others: model was 'tiny' for echo q1, and is 'other' now"),
        ({"dtype": "bfloat16"}, "dtype was 'float32'"),
        ({"max_new_tokens": 9}, "max_new_tokens was None for echo q1, and is 9 now"),
        ({"adapter": "a 12"}, "adapter was None"),
        ({"seed": 1}, "seed was 0"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict, message: str):
    path, model = tmp_path / "answers.jsonl", Scripted(lambda _: "q1")
    answers(run(model, Echo([1])), path=path)
    with pytest.raises(EvaluationError, match=message):
        answers(run(model, Echo([1]), dataclasses.replace(SETTINGS, **changes)), path=path)


def test_caches_and_questions_that_only_share_their_names_are_refused(tmp_path: Path):
    path, model = tmp_path / "answers.jsonl", Scripted(lambda _: "q1")
    answers(run(model, Echo([1])), path=path)
    with pytest.raises(EvaluationError, match=r"as the cache 'default' were others: budget was .* and is 3.5 now"):
        answers(run(model, Echo([1])), {"default": MixKVQConfig.parse("default:budget=3.5")}, path)
    other = Echo([1])
    other.questions = [dataclasses.replace(other.questions[0], right="else")]
    with pytest.raises(EvaluationError, match="questions were others: right was 'q1' for echo q1, and is 'else' now"):
        answers(run(model, other), path=path)


def test_files_that_hold_something_else(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    for content, message in [
        ("no JSON\n", "Line 1 of .* is not an answer that mixkvq eval wrote: Expecting value"),
        ('{"a": 1}\n', "Line 1 .*: fields are missing"),
        ("[]\n", "fields are missing"),
        ('{"precious": 1}', "The last line of .* has no end, and is not one that mixkvq eval began to write"),
        ('{"precious": ', "has no end"),
        ("precious", "has no end"),
        ('{"task": "mine"}', "has no end"),
        ("[1]", "has no end"),
    ]:
        path.write_text(content)
        with pytest.raises(EvaluationError, match=message):
            AnswerFile(path)
        assert path.read_text() == content
    with pytest.raises(EvaluationError, match="Cannot read the answers"):
        AnswerFile(tmp_path)


# What they come to


def answer(cache: str, question: str, correct: bool, sample: int = 0) -> Answer:
    return Answer(
        "echo",
        question,
        sample,
        cache,
        {},
        "",
        10,
        True,
        correct,
        "",
        "",
        None,
        None,
        2.5 if correct else None,
        SETTINGS,
    )


def test_differences_are_paired():
    right = {"bf16": "11110", "kivi-2": "10001", "default": "11111"}
    found = [answer(cache, str(i), mark == "1") for cache, marks in right.items() for i, mark in enumerate(marks)]
    bf16, kivi, default = accuracies(found, right)
    assert bf16.difference is None
    assert (kivi.difference.points, kivi.difference.better, kivi.difference.worse) == (pytest.approx(-40), 1, 3)
    assert kivi.difference.p == pytest.approx(2 * 5 / 16)
    assert (default.difference.better, default.difference.worse, default.difference.p) == (1, 0, 1.0)
    assert accuracies(found, ["kivi-2"])[0].accuracy == 0.4
    assert kivi.bits == 2.5
    assert kivi.exact is None
    assert "bf16" not in {row.cache for row in accuracies([x for x in found if x.cache != "bf16"], ["default"])}


def test_several_samples_are_a_mean_over_questions():
    found = [answer("bf16", q, q == "a", s) for q in "ab" for s in range(4)]
    found += [answer("default", q, s < 2, s) for q in "ab" for s in range(4)]
    bf16, default = accuracies(found, ["bf16", "default"])
    assert (default.questions, default.samples, default.accuracy) == (2, 4, 0.5)
    assert (default.low, default.high) == (bf16.low, bf16.high)  # of two questions, not of eight answers
    assert (default.difference.better, default.difference.worse, default.difference.points) == (1, 1, 0.0)


@pytest.mark.slow
def test_one_compilation_serves_all_batches_and_caches():
    model = tiny_model("llama")
    config = CompileConfig(backend="aot_eager", mode=None)
    config._compile_all_devices = True
    settings = dataclasses.replace(SETTINGS, max_new_tokens=6)
    task = Echo([60, 41, 5])
    expected = answers(run(model, task, settings, static=True), CACHES)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.generation_config.compile_config = config
    try:
        assert answers(run(model, task, settings, static=True), CACHES) == expected
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    finally:
        model.generation_config.compile_config = None
        torch._dynamo.reset()
