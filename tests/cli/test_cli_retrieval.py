"""``mixkvq retrieval`` as it is typed."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chats import chat_tokenizer
from mixkvq.cli import app
from mixkvq.report.figures import PlotError
from models import tiny_model

#: The module, of which the package ``mixkvq.cli`` has a command of the same name.
RETRIEVAL = sys.modules["mixkvq.cli.retrieval"]


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["retrieval", *(str(argument) for argument in arguments)])


def complaint(*arguments: object) -> str:
    """Standard error of a call that must fail as one line, with status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_rows_table_and_picture(chat: Path, tmp_path: Path):
    rows, picture = tmp_path / "rows.json", tmp_path / "map.svg"
    options = ("--length", 1100, "--length", 1000, "--depths", 2, "--problems", 2, "--json", rows, "--plot", picture)
    result = run("--model", chat, "--kind", "needle", "--cache", "bf16", "--cache", "kivi-2", *options)
    assert result.exit_code == 0, result.output
    assert "Found of what is hidden, 8 problems" in result.output
    assert "where bf16 > 90%" in result.output
    found = json.loads(rows.read_text())
    assert [(row["length"], row["depth"], row["cache"]) for row in found] == [
        (length, depth, cache) for length in (1000, 1100) for depth in (0.0, 1.0) for cache in ("bf16", "kivi-2")
    ]
    first = found[1]
    assert (first["kind"], first["found"], first["bits"]) == ("needle", 0.0, 3.5)
    assert first["log_probability"] < 0
    assert [reply["name"] for reply in first["replies"]] == ["needle/1000/0.000/0", "needle/1000/0.000/1"]
    assert {"model", "dtype", "text", "batch", "command", "device", "date", "torch"} <= set(first)
    assert picture.read_text().startswith("<?xml")


def test_all_kinds_by_default(chat: Path):
    result = run("--model", chat, "--cache", "default", "--length", 1200, "--depths", 1, "--problems", 1)
    assert result.exit_code == 0, result.output
    for kind in ("needle", "needles", "variables"):
        assert kind in result.output
    assert "bf16" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "nadel"), "There is no kind 'nadel'. Known: needle, needles, variables."),
        (("--cache", "defualt"), "no preset 'defualt'. Did you mean 'default'?"),
        (("--depths", 0), "--depths 0: ask for at least one"),
        (("--problems", 0), "--problems 0: ask for at least one"),
        (("--batch", 0), "--batch 0: ask for at least one"),
        (("--json", "no/such/folder/x.json"), "there is no folder"),
        (("--plot", "no/such/folder/x.svg"), "there is no folder"),
        (("--plot", "map.jpg"), "'map.jpg': a picture's name ends in .png or .svg"),
        (("--length", 5000), "--length 5000 is longer than the model's context of 4096 tokens"),
        (("--length", 300), "--length 300 is too short for --kind needle"),
        (("--text", "nowhere.txt"), "Cannot read the text 'nowhere.txt'"),
        (("--device", "abacus"), "There is no device 'abacus' here"),
    ],
)
def test_refused(chat: Path, arguments: tuple, message: str):
    assert message in complaint("--model", chat, *arguments)


def test_a_text_that_is_too_short(chat: Path, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("One two three.\n" * 10)
    assert "short.txt' has 150 tokens, and --length 1024 takes" in complaint("--model", chat, "--text", short)


def test_a_model_without_a_chat_template(tmp_path: Path):
    chat_tokenizer(None).save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    assert "The model has no chat template" in complaint("--model", tmp_path)


def test_without_matplotlib(chat: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(_: object) -> None:
        raise PlotError('Pictures take the "plots" extra: pip install "mixkvq[plots]".')

    monkeypatch.setattr("mixkvq.cli.files.new_figure", missing)
    assert 'pip install "mixkvq[plots]"' in complaint("--model", chat, "--plot", "map.svg")
