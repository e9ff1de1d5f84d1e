"""``mixkvq calibrate``: what the neighbouring systems need, from a text to a file for ``--cache``."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mixkvq.calibrate.file import Calibration
from mixkvq.cli import app

#: One window, as a tiny model takes it.
SHAPE = ("--window", 300, "--windows", 1)


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(map(str, arguments)))


def said(result: Result) -> str:
    return " ".join(result.output.split())


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
        ("--window", 200): "take windows of at least 256 tokens",
        ("--cache", "bf16"): "this cache leaves keys or values as they are",
    }.items():
        result = run("calibrate", "kvquant", out, *shape, *option)
        assert result.exit_code == 2
        assert message in said(result)
        assert len(result.output) < 500


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
        (("--window", 200), "take windows of at least 256 tokens"),
        (("--smooth", __file__), "give a folder to save the model in, not a file"),
        (("--smooth", Path(__file__).parent), "this folder is not empty"),
        (("--stretch", 0), "--stretch 0: positions advance by a factor above 0"),
        (("--tokens", 64), "plan_tokens is a whole number of tokens, at least residual_length (128)"),
    ],
)
def test_bad_words_for_pm_kvq(chat: Path, tmp_path: Path, arguments: tuple, message: str):
    shape = () if "--window" in arguments else ("--window", 300)
    words = ("--model", chat, *shape, "--windows", 1, *arguments)
    result = run("calibrate", "pm-kvq", tmp_path / "pm.json", *words)
    assert result.exit_code == 2
    assert message in said(result)


def test_frozen_channels_from_end_to_end(chat: Path, tmp_path: Path):
    out = tmp_path / "channels.json"
    result = run("calibrate", "channels", out, "--model", chat, *SHAPE)
    assert result.exit_code == 0, result.output
    assert "On text that was not calibrated on" in result.output
    found = Calibration.read(out)
    assert (found.kind, found.config.policy) == ("channels", "mixkvq")
    assert found.config.for_layer(1).policy == "frozen"
    used = run("fidelity", "--model", chat, *SHAPE, "--cache", out)
    assert used.exit_code == 0, used.output
    refused = run("calibrate", "channels", out, "--model", chat, *SHAPE, "--cache", "kivi-2")
    assert refused.exit_code == 2
    assert "ranks them within a budget" in said(refused)
