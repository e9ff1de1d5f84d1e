"""``mixkvq fidelity --reasoner``: right chains beside text."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chats import chat_tokenizer
from mixkvq.cli import app, loading
from models import tiny_model


def run(*arguments: object) -> Result:
    words = ["fidelity", "--window", "256", "--windows", "1", *map(str, arguments)]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, words)


def test_chains_stand_beside_text(chat: Path, tmp_path: Path):
    path = tmp_path / "rows.json"
    result = run("--model", chat, "--reasoner", 2, "--cache", "bf16", "--cache", "kivi-2", "--json", path)
    assert result.exit_code == 0, result.output
    assert "Right chains of 2 problems" in result.output
    rows = {row["cache"]: row for row in json.loads(path.read_text())}
    assert rows["kivi-2"]["kl"] > 0
    assert rows["kivi-2"]["chains"]["bits"] == 3.5  # heads of 16 channels: one group a value
    names = [score["name"] for score in rows["bf16"]["chains"]["scores"]]
    assert names == ["running-arithmetic/dev/0", "assignments/dev/0"]


def test_what_cannot_be_served_is_said(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "REASONER", tmp_path / "nothing")
    for arguments, message in (
        (("--reasoner", -1), "score the chains of at least one problem"),
        (("--reasoner", 2), "does not solve these problems without an adapter"),
        (("--reasoner", 2, "--adapter", tmp_path), "There is no adapter in"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())


def test_a_model_without_a_chat_template(tmp_path: Path):
    chat_tokenizer(None).save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    result = run("--model", tmp_path, "--reasoner", 1, "--cache", "bf16")
    assert result.exit_code == 2, result.output
    assert "no chat template" in " ".join(result.output.split())
