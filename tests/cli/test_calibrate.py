"""``mixkvq calibrate``: from a text to a file for ``--cache``, and back."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mixkvq import MixKVQConfig
from mixkvq.calibrate.file import Calibration
from mixkvq.cli import app
from mixkvq.policies.kvtuner import PAIRS

#: One window to search on, and one to judge on.
TINY = ("--window", 300, "--windows", 1)


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(map(str, arguments)))


def said(result: Result) -> str:
    return " ".join(result.output.split())


def test_budgets_by_layer_from_end_to_end(chat: Path, tmp_path: Path):
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
        (("--exact", 7), "Layer 7 is none of those whose keys are quantized: 0, 1"),
        (("--problems", 1), "--lost and --problems go together"),
        (("--cache", "kivi-2"), "a cache with a budget of key channels"),
        (("--window", 200), "take at least 256 tokens"),
        (("--window", 4000, "--text", "SHORT"), "has one window of 4000 tokens, and two are needed"),
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
    result = run("calibrate", "kvmix", out, "--model", chat, "--window", 60, "--windows", 2)
    assert result.exit_code == 0, result.output
    found = Calibration.read(out)
    assert found.config.policy == "kvmix"
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


def test_bits_within_lost_points(chat: Path, problems: Path, tmp_path: Path):
    out = tmp_path / "found.json"
    scored = ("--lost", 5, "--problems", 2, "--data-dir", problems, "--max-new-tokens", 3)
    result = run("calibrate", "budget", out, "--model", chat, *TINY, *scored)
    assert result.exit_code == 0, result.output
    assert "0.0% of 2 problems are right in full precision" in said(result)
    found = Calibration.read(out)
    # A random model loses nothing, however few the bits.
    assert found.results["found"]["bits"] < 3.6
    assert (found.about["problems"], found.about["data_dir"]) == (2, problems.name)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """A folder with training problems of GSM8K."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"One more.\n#### {n + 1}"} for n in range(3)]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_thresholds_searched_on_right_answers(chat: Path, problems: Path, tmp_path: Path):
    scored = ("--problems", 2, "--data-dir", problems, "--max-new-tokens", 3)
    result = run("calibrate", "thresholds", tmp_path / "found.json", "--model", chat, *TINY, *scored, "--tries", 3)
    assert result.exit_code == 0, result.output
    found = Calibration.read(tmp_path / "found.json")
    assert found.results["score"] == "wrong answers"
    assert all(point["loss"] == 1 for point in found.results["front"])  # a random model, and three tokens
    assert found.about["problems"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kvtuner", "OUT", "--bits", 2.5), "2.5 bits are below the floor of 3.5"),
        (("kvtuner", "OUT", "--tries", 0), "--tries 0: try at least one"),
        (("kvtuner", "OUT", "--plot", "front.gif"), "a picture's name ends in .png or .svg"),
        (("kvtuner", "OUT", "--window", 100), "take at least 256 tokens"),
        (("kvtuner", "OUT", "--tries", 1, "--bits", 4), "None of 1 points that were tried takes at most 4 bits"),
        (("thresholds", "OUT", "--bits", 2), "Choose bits between 2.14 and"),
        (("thresholds", "OUT", "--bits", 2.3, "--tries", 0), "--tries 0: try at least one"),
        (("thresholds", "--trials", "trials"), "--trials is for a search, which writes a file"),
        (("thresholds", "OUT", "--data-dir", "."), "say how many to score the search on with --problems"),
        (("thresholds", "OUT", "--problems", 1, "--data-dir", "EMPTY"), "There is no gsm8k_train.jsonl in"),
        (("thresholds", "OUT", "--problems", 0, "--data-dir", "PROBLEMS"), "0 problems: ask for at least one"),
        (("thresholds", "OUT", "--problems", 1, "--data-dir", "UNANSWERED"), "is no problem: it takes an 'answer'"),
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
