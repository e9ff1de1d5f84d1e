"""``mixkvq calibrate``: from a text to a file for ``--cache``, and back."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from chats import END, chat_tokenizer
from mixkvq import MixKVQConfig
from mixkvq.calibrate.file import Calibration
from mixkvq.cli import app
from mixkvq.policies.kvtuner import PAIRS
from models import VOCABULARY, tiny_model

#: One window to search on, and one to judge on.
TINY = ("--window", 300, "--windows", 1)
#: What no model answers in three tokens.
UNSOLVED = ("--problems", 2, "--data-dir", "PROBLEMS", "--max-new-tokens", 3)


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(map(str, arguments)))


def said(result: Result) -> str:
    return " ".join(result.output.split())


def test_budgets_by_layer_from_end_to_end(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "found.json"
    shape = ("--model", chat, "--window", 300, "--windows", 1)
    words = ("calibrate", "budget", out, *shape, "--bits", 4, "--trials", tmp_path / "trials")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "On text that was not calibrated on" in result.output
    found = Calibration.read(out)
    assert found.kind == "budget"
    assert found.results["found"]["bits"] <= 4
    assert found.about["window"] == 300
    with monkeypatch.context() as without:
        for measuring in ("mixkvq.calibrate.budget.record", "mixkvq.calibrate.judge.fidelity"):
            without.setattr(measuring, None)
        again = run(*words)  # everything was measured before
    assert again.exit_code == 0, again.output
    assert Calibration.read(out).config == found.config
    used = run("fidelity", "--model", chat, "--window", 300, "--windows", 1, "--cache", out)
    assert used.exit_code == 0, used.output


def test_a_tolerance_instead_of_bits(chat: Path, tmp_path: Path):
    out = tmp_path / "found.json"
    shape = ("--model", chat, "--window", 300, "--windows", 1)
    assert run("calibrate", "budget", out, *shape, "--bits", 4).exit_code == 0
    kl = 1.2 * Calibration.read(out).results["found"]["kl"]
    result = run("calibrate", "budget", out, *shape, "--kl", kl)
    assert result.exit_code == 0, result.output
    assert Calibration.read(out).results["found"]["kl"] <= kl


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 2), "2 bits are below the floor of"),
        (("--kl", 1e-12), "No bits by layer keep the KL within 1e-12"),
        (("--bits", 3, "--kl", 1), "Give one of --bits, --kl and --lost"),
        (("--lost", 1), "--lost and --problems go together"),
        (("--reasoner", -1), "--reasoner -1: calibrate on the chains of at least one problem, or of none"),
        (("--exact", 7), "Layer 7 is none of those whose keys are quantized: 0, 1"),
        (("--problems", 1), "--lost and --problems go together"),
        (("--cache", "kivi-2"), "a cache with a budget of key channels"),
        (("--window", 200), "take windows of at least 256 tokens"),
        (("--window", 4000, "--text", "SHORT"), "No text has two windows of 4000 tokens"),
    ],
)
def test_goals_that_cannot_be_reached(chat: Path, tmp_path: Path, arguments: tuple, message: str):
    (tmp_path / "short.txt").write_text("word " * 1000)
    arguments = tuple(tmp_path / "short.txt" if word == "SHORT" else word for word in arguments)
    shape = ("--model", chat, "--window", 300, "--windows", 1)
    result = run("calibrate", "budget", tmp_path / "found.json", *shape, *arguments)
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert not (tmp_path / "found.json").exists()


def test_an_interruption_says_what_is_left(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mixkvq.cli.calibrate.budget"], "measure_menu", interrupted)
    words = ("calibrate", "budget", tmp_path / "found.json", "--model", chat, "--window", 300, "--windows", 1)
    for more, message in (
        ((), "nothing was written"),
        (("--trials", tmp_path / "trials"), "what was measured is in"),
    ):
        result = run(*words, *more)
        assert result.exit_code == 130
        assert message in said(result)


def test_kvmix_writes_its_profile(chat: Path, tmp_path: Path):
    out = tmp_path / "kvmix.json"
    result = run("calibrate", "kvmix", out, "--model", chat, "--window", 300, "--windows", 2)
    assert result.exit_code == 0, result.output
    found = Calibration.read(out)
    assert found.config.policy == "kvmix"
    assert found.config.recent == 0.1
    assert set(found.results["key_norms"]) == {"0", "1"}
    assert MixKVQConfig.parse(str(out)) == found.config


def test_kvtuner_from_end_to_end(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, picture = tmp_path / "found.json", tmp_path / "front.svg"
    words = ("calibrate", "kvtuner", out, "--model", chat, *TINY, "--trials", tmp_path / "trials")
    result = run(*words, "--bits", 5, "--tries", 8, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "Pareto front" in result.output
    assert "honest bits" in picture.read_text()
    found = Calibration.read(out)
    assert (found.kind, found.config.policy) == ("kvtuner", "kvtuner")
    assert found.results["found"]["bits"] <= 5
    assert set(found.results["layers"]) == {"0", "1"}
    for fields in found.config.as_dict()["layers"]:
        assert (fields["key_bits"], fields["value_bits"]) in PAIRS
    monkeypatch.setattr("mixkvq.calibrate.judge.fidelity", None)
    again = run(*words, "--bits", 5, "--tries", 8)  # everything was measured before
    assert again.exit_code == 0, again.output
    assert Calibration.read(out).config == found.config
    assert Calibration.read(out).results == found.results
    assert run("fidelity", "--model", chat, *TINY, "--cache", out).exit_code == 0


def test_searched_thresholds_from_end_to_end(chat: Path, tmp_path: Path):
    out, picture, rows = tmp_path / "found.json", tmp_path / "front.png", tmp_path / "rows.json"
    shape = ("--model", chat, *TINY, "--trials", tmp_path / "trials", "--plot", picture, "--json", rows)
    result = run("calibrate", "thresholds", out, *shape, "--bits", 3.2, "--tries", 12)
    assert result.exit_code == 0, result.output
    assert "Pareto front of 12 points" in said(result)
    assert picture.exists()
    found = Calibration.read(out)
    assert (found.kind, found.config.policy) == ("thresholds", "mixkvq")
    assert found.config.tau_bf16 == found.results["tau_bf16"] > found.config.tau_uint4
    assert found.config.model.startswith("llama of 2 layers")
    points = json.loads(rows.read_text())
    assert len(points) == 12
    assert points[0]["params"] == pytest.approx({"bf16_share": 0.01, "uint4_share": 0.53})
    assert run("fidelity", "--model", chat, *TINY, "--cache", out).exit_code == 0


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """A folder with training problems of GSM8K, which no random model solves."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"One more.\n#### {n + 1}"} for n in range(3)]
    return write_problems(tmp_path, rows)


def write_problems(folder: Path, rows: list[dict[str, str]], part: str = "train") -> Path:
    (folder / f"gsm8k_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def reckoner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that writes a few digits and ends; which ones depends on all of the prompt."""
    path = tmp_path_factory.mktemp("reckoner")
    tokenizer, model = chat_tokenizer(), copy.deepcopy(tiny_model("llama"))
    others = torch.ones(VOCABULARY, dtype=torch.bool)
    others[[*tokenizer("0123456789", add_special_tokens=False)["input_ids"], END]] = False
    with torch.no_grad():
        model.lm_head.weight[others] = 0
        model.lm_head.weight[END] *= 1.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 6  # what is attended to decides
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def solvable(reckoner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with problems that this model solves: their answers are what it says in full precision."""
    folder = tmp_path_factory.mktemp("solvable")
    questions = [f"{'How much is this, and that? ' * 8}{37 * n % 100} + {n}?" for n in range(12)]
    write_problems(folder, [{"question": question, "answer": "#### 0"} for question in questions], "test")
    answers = folder / "answers.jsonl"
    words = ("--data-dir", folder, "--cache", "bf16", "--dtype", "float32", "--temperature", 0, "--answers", answers)
    result = run("eval", "gsm8k", "--model", reckoner, *words, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    texts = {row["question"]: row["text"] for row in rows if "text" in row}
    solved = [{"question": asked, "answer": f"#### {texts[f'gsm8k/{n}']}"} for n, asked in enumerate(questions)]
    return write_problems(folder, solved)


def test_bits_within_lost_points(reckoner: Path, solvable: Path, tmp_path: Path):
    scored = ("--problems", 12, "--data-dir", solvable, "--max-new-tokens", 8, "--trials", tmp_path / "trials")
    bits = {}
    for lost in (0, 100):
        out = tmp_path / f"{lost}.json"
        result = run("calibrate", "budget", out, "--model", reckoner, *TINY, "--lost", lost, *scored)
        assert result.exit_code == 0, result.output
        assert "100.0% of 12 problems are right in full precision" in said(result)
        found = Calibration.read(out)
        bits[lost] = found.results["found"]["bits"]
        assert found.about["problems"] == 12
    assert bits[100] < bits[0]


def test_thresholds_searched_on_right_answers(reckoner: Path, solvable: Path, tmp_path: Path):
    scored = ("--problems", 12, "--data-dir", solvable, "--max-new-tokens", 8, "--bits", 4)
    out = tmp_path / "found.json"
    result = run("calibrate", "thresholds", out, "--model", reckoner, *TINY, *scored, "--tries", 6)
    assert result.exit_code == 0, result.output
    found = Calibration.read(out)
    assert found.results["score"] == "wrong answers"
    assert found.about["problems"] == 12
    losses = [point["loss"] for point in found.results["front"]]
    assert losses == sorted(losses, reverse=True)  # by rising bits
    assert losses[-1] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kvtuner", "OUT", "--bits", 2.5), "2.5 bits are below the floor of 3.5"),
        (("kvtuner", "OUT", "--tries", 0), "--tries 0: try at least one"),
        (("kvtuner", "OUT", "--plot", "front.gif"), "a picture's name ends in .png or .svg"),
        (("kvtuner", "OUT", "--window", 100), "take windows of at least 256 tokens"),
        (("kvtuner", "OUT", "--tries", 1, "--bits", 4), "None of 1 points that were tried takes at most 4 bits"),
        (("thresholds", "OUT", "--bits", 2), "Choose bits between 2.14 and"),
        (("thresholds", "OUT", "--bits", 2.3, "--tries", 0), "--tries 0: try at least one"),
        (
            ("thresholds", "OUT", "--windows", 0),
            "--windows 0: take windows of at least 256 tokens (the first 128 are not scored), and at least one",
        ),
        (("thresholds", "--trials", "trials"), "--trials is for a search, which writes a file"),
        (("thresholds", "OUT", "--data-dir", "."), "say how many to score the search on with --problems"),
        (("thresholds", "OUT", "--problems", 1, "--data-dir", "EMPTY"), "There is no gsm8k_train.jsonl in"),
        (("thresholds", "OUT", "--problems", 0, "--data-dir", "PROBLEMS"), "0 problems: ask for at least one"),
        (("thresholds", "OUT", "--problems", 1, "--data-dir", "UNANSWERED"), "is no problem: it takes an 'answer'"),
        (("thresholds", "OUT", *UNSOLVED, "--tries", 1), "None of the problems was answered right with any"),
        (("budget", "OUT", *UNSOLVED, "--lost", 1), "None of 2 problems is answered right in full precision"),
    ],
)
def test_searches_that_cannot_be_made(chat: Path, problems: Path, tmp_path: Path, arguments: tuple, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unanswered").mkdir()
    (tmp_path / "unanswered" / "gsm8k_train.jsonl").write_text('{"question": "What is 1 + 1?"}\n')
    places = {
        "OUT": tmp_path / "found.json",
        "EMPTY": tmp_path / "empty",
        "PROBLEMS": problems,
        "UNANSWERED": tmp_path / "unanswered",
    }
    command, *rest = (places.get(word, word) for word in arguments)
    result = run("calibrate", command, "--model", chat, *TINY, *rest)
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert "Traceback" not in result.output
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("command", ["kvtuner", "thresholds"])
def test_an_interrupted_search_says_what_is_left(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[f"mixkvq.cli.calibrate.{command}"], "search", interrupted)
    words = ("calibrate", command, tmp_path / "found.json", "--model", chat, *TINY, "--trials", tmp_path / "trials")
    result = run(*words)
    assert result.exit_code == 130
    assert "what was measured is in" in said(result)


BUDGET = ("calibrate", "budget")
SEARCHES = {
    "budget": ("--bits", 4),
    "kvtuner": ("--bits", 5, "--tries", 8),
    "thresholds": ("--bits", 3.2, "--tries", 3),
}


@pytest.mark.parametrize("command", [*SEARCHES, "kvmix", "pm-kvq"])
def test_trials_on_another_text_of_the_same_name_are_refused(chat: Path, tmp_path: Path, command: str):
    out = tmp_path / "found.json"
    for folder, words in (("a", "one two three "), ("b", "three two one ")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(words * 1000)
    shape = ("--model", chat, *TINY, *SEARCHES.get(command, ()), "--trials", tmp_path / "trials")
    first = run("calibrate", command, out, *shape, "--text", tmp_path / "a" / "text.txt")
    assert first.exit_code == 0, first.output
    second = run("calibrate", command, out, *shape, "--text", tmp_path / "b" / "text.txt")
    assert second.exit_code == 2
    assert "holds trials of other settings (tokens)" in said(second)


def test_trials_on_other_weights_or_problems_are_refused(reckoner: Path, solvable: Path, tmp_path: Path):
    words = (*BUDGET, tmp_path / "found.json", *TINY, "--lost", 100, "--max-new-tokens", 8, "--trials", tmp_path / "t")
    scored = ("--problems", 12, "--data-dir", solvable)
    assert run(*words, *scored, "--model", reckoner).exit_code == 0
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight *= 1.1
    other = tmp_path / reckoner.name
    for part in (model, chat_tokenizer()):
        part.save_pretrained(other)
    refused = run(*words, *scored, "--model", other)
    assert "holds trials of other settings (weights)" in said(refused)
    rows = [json.loads(line) for line in (solvable / "gsm8k_train.jsonl").read_text().splitlines()]
    folder = tmp_path / solvable.name
    folder.mkdir()
    write_problems(folder, rows[::-1])
    refused = run(*words, "--problems", 12, "--data-dir", folder, "--model", reckoner)
    assert "holds trials of other settings (questions)" in said(refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("found",), "a calibration's name ends in .json"),
        (("none/found.json",), "there is no folder"),
        (("text.json", "--text", "text.json"), "is the text to read, and would be written over"),
        (("found.json", "--text", "text.json", "--trials", "text.json"), "is the text to read, and would be written"),
        (("found.json", "--trials", "found.json"), "would be written twice"),
        (("found.json", "--trials", "text.json"), "'text.json' cannot be used for trials"),
        (("found.json", "--cache", "default:sinks=400"), "take windows of at least 529 tokens"),
        (("found.json", "--cache", "default:residual_length=4096"), "take windows of at least 4101 tokens"),
        (("found.json", "--trials", "none/trials"), "there is no folder"),
        (("found.json", "--kl", "nan"), "--kl nan: a cache of fewer bits has a KL above 0"),
        (("found.json", "--kl", -1), "--kl -1: a cache of fewer bits has a KL above 0"),
        (("found.json", "--lost", -1, "--problems", 1), "--lost -1: lose no points, or some"),
        (("found.json", "--bits", "nan"), "nan bits are below the floor of"),
        (("found.json", "--bits", 1), "1 bits are below the floor of"),
        (("found.json", "--exact", 9), "Layer 9 is none of those"),
        (("found.json", "--seed", -1), "Invalid value for '--seed'"),
        (("found.json", "--batch", 0), "Invalid value for '--batch'"),
        (("found.json", "--windows", 0), "take windows of at least 256 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("word " * 2000)
    monkeypatch.setattr(sys.modules["mixkvq.cli.calibrate.budget"], "measure_menu", None)
    result = run(*BUDGET, arguments[0], "--model", chat, *TINY, *arguments[1:])
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


def test_results_are_not_written_over_what_is_read_or_each_other(chat: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    out, shape = tmp_path / "found.json", ("--model", chat, *TINY)
    for words, message in (
        (("thresholds", "--text", text, "--json", text), "is the text to read"),
        (("thresholds", out, "--json", out), "would be written twice"),
        (("thresholds", out, "--json", tmp_path / "a.png", "--plot", tmp_path / "a.png"), "would be written twice"),
        (("kvtuner", out, "--trials", tmp_path / "a.svg", "--plot", tmp_path / "a.svg"), "would be written twice"),
    ):
        result = run("calibrate", *words, *shape)
        assert result.exit_code == 2
        assert message in said(result)
    result = run("fidelity", "--text", text, "--json", text, *shape)
    assert "is the text to read" in said(result)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("name", ["[a].json", "x[/b].json", "a b.json", "2026-11-27T12:30.json"])
def test_files_of_unusual_names_are_written_named_and_used(chat: Path, tmp_path: Path, name: str):
    out = tmp_path / name
    out.parent.mkdir(exist_ok=True)
    result = run("calibrate", "channels", out, "--model", chat, *TINY)
    assert result.exit_code == 0, result.output
    assert f"use it with --cache {out}" in result.output.replace("\n", "")
    rows = tmp_path / "[rows].json"
    used = run("fidelity", "--model", chat, *TINY, "--cache", f"{out}:debug=true", "--json", rows)
    assert used.exit_code == 0, used.output
    assert f"Wrote {rows}" in used.output.replace("\n", "")


def test_a_model_that_computes_no_numbers(chat: Path, tmp_path: Path):
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    for part in (model, chat_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    for command in ("budget", "kvmix", "channels", "pm-kvq"):
        result = run("calibrate", command, tmp_path / "found.json", "--model", tmp_path / "model", *TINY)
        assert result.exit_code == 2, result.output
        assert "this model's logits are no numbers: choose another type with --dtype" in said(result)


def test_a_moved_model_and_text_go_on_from_the_same_trials(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{place}.txt").write_text("one two three " * 1000)
        for part in (tiny_model("llama"), chat_tokenizer()):
            part.save_pretrained(tmp_path / place / "model")
    words = ("calibrate", "kvmix", tmp_path / "found.json", *TINY, "--trials", tmp_path / "trials")
    for place in ("a", "b"):
        folder = tmp_path / place
        result = run(*words, "--model", folder / "model", "--text", folder / f"{place}.txt")
        assert result.exit_code == 0, result.output
        monkeypatch.setattr("mixkvq.calibrate.kvmix.torch.autograd.grad", None)  # measured already
        monkeypatch.setattr("mixkvq.calibrate.judge.fidelity", None)


@pytest.mark.parametrize(
    ("command", "package"), [("budget", "scipy.optimize"), ("kvtuner", "optuna"), ("pm-kvq", "scipy.optimize")]
)
def test_a_missing_package_is_noticed_before_the_model_is_loaded(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, package: str
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys.modules["mixkvq.cli.calibrate.subject"], "load_model", None)
    result = run("calibrate", command, tmp_path / "found.json", "--model", chat, *TINY)
    assert result.exit_code == 2
    assert f'takes the "calibrate" extra ({package} is missing)' in said(result)


def test_fewer_windows_than_asked_for_are_said_and_recorded(chat: Path, tmp_path: Path):
    out, text = tmp_path / "found.json", tmp_path / "text.txt"
    text.write_text("word " * 1000)
    shape = ("--model", chat, "--window", 300, "--text", text)
    result = run("calibrate", "channels", out, *shape, "--windows", 50)
    assert result.exit_code == 0, result.output
    assert "of 300 tokens, of 100 that were asked for" in said(result)
    assert 0 < Calibration.read(out).about["windows"] < 50
    assert "of 50 that were asked for" in said(run("fidelity", *shape, "--windows", 50, "--cache", "kivi-4"))


def test_more_bits_than_there_are(chat: Path, tmp_path: Path):
    result = run(*BUDGET, tmp_path / "found.json", "--model", chat, *TINY, "--bits", 100)
    assert result.exit_code == 0, result.output
    assert "fewer than 100" in said(result)


def test_a_calibration_that_is_worth_nothing_says_so(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = iter([{"kl": 0.1, "bits": 3.0, "perplexity": 9.0}, {"kl": 0.2, "bits": 3.1, "perplexity": 9.0}])
    monkeypatch.setattr("mixkvq.calibrate.judge.Judge.__call__", lambda *_: next(rows))
    result = run("calibrate", "channels", tmp_path / "found.json", "--model", chat, *TINY)
    assert result.exit_code == 0, result.output
    assert "what was found is no better than default on this text" in said(result)


def test_calibrations_of_other_weights_are_warned_about(chat: Path, tmp_path: Path):
    out, other = tmp_path / "found.json", tmp_path / "other"
    assert run("calibrate", "channels", out, "--model", chat, *TINY).exit_code == 0
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.lm_head.weight *= 2
    for part in (model, chat_tokenizer()):
        part.save_pretrained(other)
    half = run("fidelity", "--model", chat, *TINY, "--cache", out, "--dtype", "float16")
    assert "calibrated on other weights" not in said(half)
    for folder, warned in ((chat, False), (other, True)):
        result = run("fidelity", "--model", folder, *TINY, "--cache", out)
        assert result.exit_code == 0, result.output
        assert ("calibrated on other weights of this shape" in said(result)) == warned
        result = run("generate", "one two", "--model", folder, "--max-new-tokens", 2, "--cache", out)
        assert result.exit_code == 0, result.output
        assert ("calibrated on other weights of this shape" in said(result)) == warned
