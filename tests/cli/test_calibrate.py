"""``mixkvq calibrate``: from a text to a file for ``--cache``, and back."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mixkvq import MixKVQConfig
from mixkvq.calibrate.file import Calibration
from mixkvq.cli import app


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


def test_levels_from_end_to_end(chat: Path, tmp_path: Path):
    out, shape = tmp_path / "levels.json", ("--model", chat, "--window", 300, "--windows", 1)
    result = run("calibrate", "kvquant", out, *shape)
    assert result.exit_code == 0, result.output
    found = Calibration.read(out)
    assert found.kind == "kvquant"
    assert all(
        len(found.config.for_layer(i).key_levels) == len(found.config.for_layer(i).value_levels) == 4 for i in (0, 1)
    )
    used = run("fidelity", "--cache", out, *shape)
    assert used.exit_code == 0, used.output
    for option, message in {
        ("--window", 200): "take at least 256 tokens, a block and more",
        ("--cache", "bf16"): "key_levels is none, or for 16 bits",
    }.items():
        result = run("calibrate", "kvquant", out, *shape, *option)
        assert result.exit_code == 2
        assert message in said(result)


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
        (("--bits", 3, "--kl", 1), "Give --bits or --kl, not both"),
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


def test_pm_kvqs_last_widths_and_a_smooth_model(chat: Path, tmp_path: Path):
    out, smooth = tmp_path / "pm.json", tmp_path / "smooth"
    shape = ("--window", 300, "--windows", 1)
    result = run("calibrate", "pm-kvq", out, "--model", chat, *shape, "--tokens", 384, "--smooth", smooth)
    assert result.exit_code == 0, result.output
    assert "4 bits in the end: layers" in said(result)
    assert f"use it with --model {smooth}" in said(result)
    found = Calibration.read(out)
    assert (found.kind, found.config.plan_tokens, found.config.key_axis) == ("pm-kvq", 384, "token")
    assert sorted(dict(fields)["key_bits"] for fields in found.config.layers) == [2, 4]
    used = run("fidelity", "--model", smooth, *shape, "--cache", out)
    assert used.exit_code == 0, used.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--widths", 4), r"--widths takes two or three of 8, 4, 2; got [4]"),
        (("--widths", 3, "--widths", 2), "got [3, 2]"),
        (("--bits", 2), "2 bits are below the floor of"),
        (("--window", 200), "take at least 256 tokens"),
        (("--tokens", 64), "plan_tokens is a whole number of tokens, at least residual_length (128)"),
    ],
)
def test_bad_words_for_pm_kvq(chat: Path, tmp_path: Path, arguments: tuple, message: str):
    shape = () if "--window" in arguments else ("--window", 300)
    words = ("--model", chat, *shape, "--windows", 1, *arguments)
    result = run("calibrate", "pm-kvq", tmp_path / "pm.json", *words)
    assert result.exit_code != 0
    assert message in said(result)
