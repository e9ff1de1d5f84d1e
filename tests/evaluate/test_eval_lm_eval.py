"""The model ``mixkvq`` of lm-evaluation-harness: both kinds of requests really go through the packed cache."""

import json
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel
from typer.testing import CliRunner

from chats import chat_tokenizer
from mixkvq import ConfigError, MixKVQCache
from mixkvq.adapters.lm_eval import MixKVQLM
from mixkvq.cli import app
from mixkvq.models import attention
from models import tiny_model

SMALL = "default:residual_length=32;key_group=32"
TEXT = "".join(chr(97 + (7 * n) % 26) for n in range(300))
TASK = """
task: spelling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["no such text"], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
task: choosing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def harness(model: PreTrainedModel, cache: str, **options) -> MixKVQLM:
    with attention(model, "mixkvq"):
        return MixKVQLM(model, cache, tokenizer=chat_tokenizer(), **options)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"question": TEXT[n:], "answer": "x"}) + "\n" for n in (0, 40, 95)))
    for name, text in (("spelling", TASK), ("choosing", CHOICE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    return tmp_path


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, at) for at, each in enumerate(arguments)]


def test_generation_is_that_of_the_cache(model: PreTrainedModel):
    options = {"until": ["no such text"], "max_gen_toks": 30}
    questions = [TEXT, TEXT[100:], TEXT[50:90]]
    ours = harness(model, SMALL, batch_size=2)
    with attention(model, "mixkvq"):
        texts = ours.generate_until(requests("generate_until", *((each, options) for each in questions)))
        for question, text in zip(questions, texts, strict=True):
            ids = torch.tensor([chat_tokenizer()(question, add_special_tokens=False)["input_ids"]])
            cache = MixKVQCache(model.config, SMALL.replace(";", ","))
            out = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False, pad_token_id=2)
            assert text == chat_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(texts)) == 3


@pytest.mark.parametrize("words", [(TEXT, "z"), (TEXT[:150], TEXT[150:]), (TEXT[:1], TEXT[1:90]), ("", "abcabc")])
def test_likelihoods_are_those_of_decoding(model: PreTrainedModel, words: tuple[str, str]):
    ours = harness(model, SMALL)
    encode = chat_tokenizer()
    context, continuation = (encode(part, add_special_tokens=False)["input_ids"] for part in words)
    tokens = [*(context or [ours.prefix_token_id]), *continuation]
    begin = len(tokens) - len(continuation) - 1
    cache = MixKVQCache(model.config, SMALL.replace(";", ","))
    expected = 0.0
    with attention(model, "mixkvq"), torch.inference_mode():
        if begin:
            model(torch.tensor([tokens[:begin]]), past_key_values=cache)
        for at in range(begin, len(tokens) - 1):
            logits = model(torch.tensor([tokens[at : at + 1]]), past_key_values=cache).logits[0, -1]
            expected += logits.float().log_softmax(-1)[tokens[at + 1]].item()
        ((found, greedy),) = ours.loglikelihood(requests("loglikelihood", words), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4)
    assert greedy is False


def test_full_precision_is_what_the_harness_finds(model: PreTrainedModel):
    pairs = requests("loglikelihood", (TEXT[:200], TEXT[200:]), (TEXT[:20], "yes"))
    whole = requests("loglikelihood_rolling", (TEXT,))
    results = []
    for kind, cache in ((HFLM, None), (MixKVQLM, "bf16"), (MixKVQLM, "kivi-2")):
        with attention(model, "mixkvq" if cache else "sdpa"):
            each = kind(model, tokenizer=chat_tokenizer(), **({"cache": cache} if cache else {}))
            scores = [score for score, _ in each.loglikelihood(pairs, disable_tqdm=True)]
            results.append([*scores, *each.loglikelihood_rolling(whole, disable_tqdm=True)])
    stock, full, packed = results
    assert full == pytest.approx(stock, rel=1e-4)
    assert packed[0] != pytest.approx(stock[0], rel=1e-4)


def test_a_greedy_continuation_is_told(model: PreTrainedModel):
    ours = harness(model, "bf16")
    context = chat_tokenizer()(TEXT[:40], add_special_tokens=False)["input_ids"]
    with attention(model, "sdpa"):
        out = model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, pad_token_id=2)
    with attention(model, "mixkvq"):
        results = ours._loglikelihood_tokens(
            [(None, context, out[0, 40:].tolist()), (None, context, [5, 6])], disable_tqdm=True
        )
    assert [greedy for _, greedy in results] == [True, False]


def test_one_cache_of_a_fixed_size_serves_all_batches(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    ours = harness(model, SMALL)
    monkeypatch.setattr(MixKVQLM, "device", torch.device("cuda"))
    first = ours._cache(2, 100)
    assert first.state.cache.capacity.max_tokens == 2 * 128
    assert ours._cache(2, 70) is first
    assert ours._cache(2, 120) is not first
    assert ours._cache(1, 120).state.cache.capacity.max_tokens == 128


def test_tasks(tasks: Path, model: PreTrainedModel):
    with attention(model, "mixkvq"):
        found = lm_eval.simple_evaluate(
            harness(model, SMALL), tasks=["spelling", "choosing"], task_manager=TaskManager(include_path=str(tasks))
        )
    assert found["results"]["spelling"]["exact_match,none"] == 0.0
    assert 0 <= found["results"]["choosing"]["acc,none"] <= 1


def test_the_command(tasks: Path):
    folder = tasks / "model"
    chat_tokenizer().save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    options = [
        "--tasks",
        "spelling",
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
        "--output_path",
        str(tasks / "o"),
    ]
    arguments = f"pretrained={folder},dtype=float32,cache={SMALL}"
    result = CliRunner().invoke(app, ["eval", "lm-eval", "--model_args", arguments, *options])
    assert result.exit_code == 0, result.output
    written = json.loads(next((tasks / "o").rglob("results*.json")).read_text())
    assert written["config"]["model"] == "mixkvq"
    assert written["config"]["model_args"]["cache"] == SMALL
    wrong = CliRunner().invoke(app, ["eval", "lm-eval", "--model_args", arguments.replace("defa", "Defa"), *options])
    assert wrong.exit_code == 2
    assert "no preset 'Default" in " ".join(wrong.output.split())


def test_what_cannot_be_made(model: PreTrainedModel):
    with pytest.raises(ConfigError, match="budget lies between"):
        harness(model, "default:budget=9;value_bits=4")
