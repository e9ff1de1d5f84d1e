"""``mixkvq eval`` as it is typed: tables, files to go on with, and errors that say what to do."""

import copy
import json
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner, Result

from chats import Scripted, chat_tokenizer
from mixkvq import CacheFullError
from mixkvq.cli import app, loading
from mixkvq.evaluate.answers import Settings
from mixkvq.evaluate.problems import problem_set
from mixkvq.evaluate.runner import Run
from mixkvq.evaluate.tasks import Reasoner
from models import tiny_model

LINEAR = ["q_proj", "v_proj"]
#: The module, of which the package ``mixkvq.cli`` has a command of the same name.
EVAL = sys.modules["mixkvq.cli.eval"]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """A model that solves the reasoner's problems, but for those of the second family."""
    problems = problem_set(18, longest=120)
    chains = {problem.prompt: problem.chain for problem in problems}
    wrong = {problem.prompt for problem in problems if problem.family == problems[1].family}
    model = Scripted(lambda prompt: "Answer: none" if prompt in wrong else chains[prompt])
    monkeypatch.setattr(EVAL, "load_model", lambda *_: (model, chat_tokenizer()))
    return model


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["eval", *(str(argument) for argument in arguments)])


def complaint(*arguments: object) -> str:
    """Standard error of a call that must fail as one line, with status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_reasoner(scripted: Scripted, tmp_path: Path):
    rows_path, answers = tmp_path / "rows.json", tmp_path / "answers.jsonl"
    options = ("--model", "m", "--problems", 9, "--longest", 120, "--answers", answers, "--json", rows_path)
    result = run("reasoner", "--cache", "bf16", "--cache", "kivi-2", *options)
    assert result.exit_code == 0, result.output
    assert "reasoner: 9 questions" in result.output
    for word in ("right", "88.9%", "56.5 to 98.0", "+0.0", "exact", "cut off"):
        assert word in result.output
    bf16, kivi = json.loads(rows_path.read_text())
    assert (bf16["cache"], bf16["accuracy"], bf16["exact"], bf16["cut_off"]) == ("bf16", 8 / 9, 8 / 9, 0.0)
    assert bf16["difference"] is None
    assert kivi["difference"] == {"points": 0.0, "better": 0, "worse": 0, "p": 1.0}
    assert kivi["families"]["assignments"] == {"questions": 1, "accuracy": 0.0}
    assert sum(group["questions"] for group in kivi["lengths"].values()) == 9
    assert {"model", "dtype", "seed", "command", "date", "device", "batch"} <= set(kivi)
    assert len(answers.read_text().splitlines()) == 18


def test_the_same_command_goes_on(scripted: Scripted, tmp_path: Path):
    answers = tmp_path / "answers.jsonl"
    options = ("--model", "m", "--longest", 120, "--batch", 2, "--cache", "bf16", "--answers", answers)
    run("reasoner", "--problems", 4, *options)
    answers.write_bytes(answers.read_bytes()[:-5])
    scripted.calls.clear()
    result = run("reasoner", "--problems", 5, *options)
    words = " ".join(result.output.split())
    assert "was not whole (an interrupted write); it is dropped" in words
    assert "has 3 of 5 answers; the rest is asked for" in words
    assert sorted(map(len, scripted.calls)) == [1, 2]  # one of the two was there; its batch is asked as a whole
    assert len(answers.read_text().splitlines()) == 5
    assert "reasoner: 5 questions" in result.output
    refused = complaint("reasoner", "--problems", 5, "--max-new-tokens", 9, *options)
    assert "max_new_tokens was None" in refused
    assert "Give another file with --answers, or what that run was given." in refused


def test_interrupting_keeps_the_answers(scripted: Scripted, tmp_path: Path):
    answers = tmp_path / "answers.jsonl"
    reply = scripted.reply

    def interrupted(prompt: str) -> str:
        if scripted.calls[-1:] and len(scripted.calls) == 2:
            raise KeyboardInterrupt
        return reply(prompt)

    scripted.reply = interrupted
    options = ("reasoner", "--model", "m", "--problems", 4, "--longest", 120, "--batch", 2, "--cache", "bf16")
    result = run(*options, "--answers", answers)
    assert result.exit_code == 130
    assert "holds 2 answers. The same command goes on from there." in " ".join(result.output.split())
    scripted.calls.clear()
    assert "nothing was written" in run(*options, "--batch", 1).output
    scripted.reply = reply
    scripted.calls.clear()
    assert run(*options, "--answers", answers).exit_code == 0
    assert sum(map(len, scripted.calls)) == 2


def test_interrupting_changes_no_file(scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither one with a line that was cut off, nor one of something else that was named by mistake."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    answers = tmp_path / "answers.jsonl"
    options = ("reasoner", "--model", "m", "--problems", 2, "--longest", 120, "--cache", "bf16", "--answers", answers)
    run(*options)
    monkeypatch.setattr(EVAL, "Reasoner", interrupted)
    for content, message in [
        (answers.read_bytes()[:-5], "holds 1 answers"),
        (b'{"precious": 1}', "Interrupted; nothing"),
    ]:
        answers.write_bytes(content)
        result = run(*options)
        assert result.exit_code == 130
        assert message in " ".join(result.output.split())
        assert answers.read_bytes() == content


def test_a_file_of_something_else_is_left_alone(scripted: Scripted, tmp_path: Path):
    other = tmp_path / "precious.json"
    other.write_text('{"precious": 1}')
    words = complaint("reasoner", "--model", "m", "--problems", 1, "--longest", 120, "--answers", other)
    assert "is not one that mixkvq eval began to write. Give another file with --answers" in words
    assert other.read_text() == '{"precious": 1}'


def test_a_context_that_is_too_short(scripted: Scripted):
    options = ("reasoner", "--model", "m", "--problems", 9, "--longest", 120, "--cache", "bf16")
    assert "leaves" not in run(*options).output
    task = Reasoner(9, longest=120)
    items = Run(scripted, chat_tokenizer(), task, Settings("m", None, "", None, 0.0, 1.0, 0), batch=1).items
    scripted.config = copy.copy(scripted.config)
    scripted.config.max_position_embeddings = context = items[0].length - 1
    result = run(*options)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert words.count(f"context of {context:,} leaves 1 of 9 questions fewer new tokens than they should have") == 1
    context = len(items[0].prompt) + items[0].chain_tokens - 1
    scripted.config.max_position_embeddings = context
    assert f"more than the model's context of {context:,}: no cache could be right. Ask for" in complaint(*options)


def test_a_cache_that_is_full_is_no_traceback(scripted: Scripted, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise CacheFullError("The cache is full.")

    monkeypatch.setattr(scripted, "generate", full)
    assert "Error: The cache is full." in complaint("reasoner", "--model", "m", "--problems", 1, "--longest", 120)


def test_a_real_model_with_an_adapter(chat: Path, tmp_path: Path):
    adapter, rows = tmp_path / "adapter", tmp_path / "rows.json"
    model = type(tiny_model("llama")).from_pretrained(chat)
    get_peft_model(model, LoraConfig(r=2, target_modules=LINEAR, task_type="CAUSAL_LM")).save_pretrained(adapter)
    options = ("--problems", 2, "--longest", 100, "--max-new-tokens", 20, "--dtype", "float32", "--json", rows)
    result = run("reasoner", "--model", chat, "--adapter", adapter, "--cache", "default", *options)
    assert result.exit_code == 0, result.output
    row = json.loads(rows.read_text())[0]
    assert row["adapter"].startswith("adapter ")
    assert (row["accuracy"], row["questions"], row["difference"]) == (0.0, 2, None)
    assert "p" not in result.output.split("questions")[1].splitlines()[2].split()
    (adapter / "adapter_model.safetensors").unlink()
    assert "Could not put the adapter" in complaint("reasoner", "--model", chat, "--adapter", adapter, *options)


def test_benchmarks(chat: Path, tmp_path: Path):
    lines = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3)]
    (tmp_path / "aime_2025.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, answers = tmp_path / "rows.json", tmp_path / "answers.jsonl"
    options = ("--model", chat, "--dtype", "float32", "--data-dir", tmp_path, "--max-new-tokens", 8, "--json", rows)
    result = run("aime-2025", *options, "--samples", 2, "--seed", 5, "--answers", answers)
    assert result.exit_code == 0, result.output
    assert "aime-2025: 3 questions, 2 answers to each" in result.output
    bf16, default = json.loads(rows.read_text())
    assert (bf16["samples"], bf16["temperature"], bf16["top_p"], bf16["seed"]) == (2, 0.6, 0.95, 5)
    assert (bf16["exact"], bf16["families"], bf16["lengths"]) == (None, {}, {})
    assert default["difference"]["p"] == 1.0
    first = answers.read_text()
    answers.unlink()
    run("aime-2025", *options, "--samples", 2, "--seed", 5, "--answers", answers)
    assert answers.read_text() == first
    assert "exact" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reasoner", "--families", "swaps,swapz"), "There is no family 'swapz'. Known: running-arithmetic"),
        (("reasoner", "--problems", 0), "0 problems: ask for at least one"),
        (("reasoner", "--longest", 7), "the shortest ones take 100"),
        (("reasoner", "--batch", 0), "--batch 0: write at least one answer at a time"),
        (("reasoner", "--max-new-tokens", 0), "--max-new-tokens 0: ask for at least one"),
        (("reasoner", "--cache", "defualt"), "Did you mean 'default'?"),
        (("reasoner", "--adapter", "nowhere"), "There is no adapter in 'nowhere'"),
        (("reasoner", "--answers", "no/such/a.jsonl"), "there is no folder"),
        (("reasoner", "--json", "/"), "it is a folder"),
        (("gsm8k", "--data-dir", "nowhere"), "There is no gsm8k_test.jsonl in 'nowhere'"),
        (("gsm8k", "--samples", 0), "ask for at least one answer to each problem"),
        (("gsm8k", "--samples", 2, "--temperature", 0), "all answers would be the same"),
        (("gsm8k", "--temperature", -1), "it is 0 or more"),
        (("gsm8k", "--top-p", 0), "--top-p 0.0: it lies above 0, up to 1"),
        (("gsm8k", "--adapter", "nowhere"), "There is no adapter in 'nowhere'"),
    ],
)
def test_refusals(arguments: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "adapter_config.json").write_text("{}")  # or a checkout without the adapter would be refused first
    monkeypatch.setattr(loading, "REASONER", tmp_path)
    assert message in complaint(*arguments)


def test_a_model_without_a_chat_template(tmp_path: Path):
    chat_tokenizer(None).save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    answer = complaint("reasoner", "--model", tmp_path, "--dtype", "float32", "--problems", 1)
    assert "no chat template" in answer
    assert "instruction-tuned model with --model" in answer


def test_a_checkout_without_the_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(loading, "REASONER", tmp_path / "adapter")
    assert "Give a folder with --adapter (recipes/reasoner/train.py makes one)" in complaint("reasoner")


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from mixkvq import models

    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    assert '(peft is missing): pip install "mixkvq[eval]"' in complaint("reasoner", "--adapter", tmp_path)
