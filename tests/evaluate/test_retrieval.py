"""Retrieval: prompts of exact lengths and depths, what is hidden in them, and what is measured."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from chats import END, SPECIAL, TEMPLATE, Scripted, chat_tokenizer
from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.evaluate.chains import ChatTemplateError
from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.retrieval import KINDS, Cell, Haystack, Reply, RetrievalProblem, depths, retrieval, summaries
from mixkvq.evaluate.retrieval.kinds import CHAINS, LINKS, NEEDLES, _new_words
from mixkvq.evaluate.retrieval.problems import SPARE
from mixkvq.evaluate.retrieval.prompts import fitting, hide
from mixkvq.evaluate.texts import TextError, read_text
from mixkvq.models import attention
from models import VOCABULARY, tiny_model

#: A line that was put into the text.
HIDDEN = r"^(VAR \w+ = \w+|The special number for the .*)$"
EXACT = {"bf16": MixKVQConfig.preset("bf16")}


@cache
def merging_tokenizer() -> PreTrainedTokenizerBase:
    """A small one of several characters a token, so that tokens do not grow evenly with characters."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=1500, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([read_text(None)[:60_000]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def parts(tokenizer: PreTrainedTokenizerBase, problem: RetrievalProblem) -> tuple[str, str]:
    """What is read before the question, without the introduction, and what after it."""
    before, after = (
        str(tokenizer.decode(x)) for x in (problem.tokens[: problem.context], problem.tokens[problem.context :])
    )
    return before.partition("\n\n")[2], after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [chat_tokenizer, merging_tokenizer])
def test_lengths_are_exact(kind: str, tokenizer: Callable[[], PreTrainedTokenizerBase]):
    haystack = Haystack(tokenizer())
    for length in (1500, 2048):
        problems = [problem for depth in depths(2) for problem in haystack.problems(kind, length, depth, 2)]
        rooms = {length - len(problem.tokens) for problem in problems}
        assert len(rooms) == 1
        assert max(len(problem.answer) for problem in problems) + SPARE <= min(rooms)
        for problem in problems:
            context, question = parts(tokenizer(), problem)
            assert re.match(r"\s*(What is the special number|Find all 5 variables)", question)
            assert "What is the special" not in context
            assert str(tokenizer().decode(problem.tokens + problem.answer)).endswith(", ".join(problem.wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_depths_are_exact_to_a_word(kind: str):
    haystack = Haystack(merging_tokenizer())
    for depth in depths(5):
        problem = haystack.problems(kind, 2048, depth, 1)[0]
        context, question = parts(merging_tokenizer(), problem)
        asked = problem.wanted[0] if kind == "variables" else re.search(r"number for the (\w+ \w+)", question)[1]
        before, _, after = re.split(rf"^((?:VAR|The special number).* {asked} .*)$", context, flags=re.MULTILINE)
        before, after = (re.sub(HIDDEN, "", part, flags=re.MULTILINE).strip() for part in (before, after))
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.01)
        assert (before == "") == (depth == 0)
        assert (after == "") == (depth == 1)


@pytest.mark.parametrize("kind", ["needle", "needles"])
def test_the_number_stands_in_the_prompt_once(kind: str):
    for problem in Haystack(chat_tokenizer()).problems(kind, 2048, 0.5, 5):
        prompt = str(chat_tokenizer().decode(problem.tokens))
        (number,) = problem.wanted
        assert prompt.count(number) == 1
        found = re.findall(r"special number for the (\w+ \w+) is: (\d{6})\.", prompt)
        assert (
            len(found)
            == len(dict(found))
            == len({number for _, number in found})
            == (NEEDLES if kind == "needles" else 1)
        )
        asked = re.search(r"What is the special number for the (\w+ \w+) mentioned", prompt)[1]
        assert dict(found)[asked] == number
        assert str(chat_tokenizer().decode(problem.answer)) == f" {number}"


def test_variables_lead_to_the_number():
    for problem in Haystack(chat_tokenizer()).problems("variables", 2048, 0.25, 5):
        prompt = str(chat_tokenizer().decode(problem.tokens))
        values: dict[str, str] = {}
        for name, value in re.findall(r"^VAR (\w+) = (\w+)$", prompt, re.MULTILINE):
            assert name not in values
            values[name] = values.get(value, value)  # a name is assigned before it is used
        assert len(values) == CHAINS * LINKS
        assert sorted(map(list(values.values()).count, set(values.values()))) == [LINKS] * CHAINS
        number = re.search(r"assigned the value (\d+) in the text", prompt)[1]
        assert problem.wanted == tuple(name for name, value in values.items() if value == number)


def test_the_same_name_is_the_same_problem():
    first, second = (Haystack(chat_tokenizer()).problems("needles", 1024, 0.5, n) for n in (2, 3))
    assert first == second[:2]
    assert len({problem.wanted for problem in second}) == 3
    assert len({tuple(problem.tokens[100:300]) for problem in second}) == 3
    assert [problem.name for problem in first] == ["needles/1024/0.500/0", "needles/1024/0.500/1"]


def test_what_stands_in_the_text_is_not_hidden():
    drawn = iter(["aa", "bb", "aa", "cc", "dd"])
    assert _new_words(lambda: next(drawn), 3, "bb or not") == ["aa", "cc", "dd"]


def test_depths():
    assert depths(1) == [0.5]
    assert depths(5) == [0, 0.25, 0.5, 0.75, 1]


def test_hiding():
    lines = [(1.0, "Z"), (0.5, "B"), (0.0, "A"), (0.5, "C")]
    assert hide("one two three four", lines) == "A\none two\nB\nC\nthree four\nZ"
    assert hide("", lines) == "A\nB\nC\nZ"
    assert hide("語" * 100, [(0.5, "A")]) == "語" * 50 + "\nA\n" + "語" * 50


def test_fitting():
    assert fitting(lambda at: 7 + at // 3, 50, 1000) in range(129, 132)
    assert fitting(lambda at: 7 + at // 3, 5, 1000) is None
    assert fitting(lambda at: 7 + at // 3, 50, 100) is None
    assert fitting(lambda at: 2 * at, 51, 100) is None


def test_lengths_that_cannot_be(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("One two three.\n" * 40)
    haystack = Haystack(chat_tokenizer(), path)
    with pytest.raises(EvaluationError, match=r"--length 300 is too short for --kind needles: .* take \d+ tokens"):
        haystack.problems("needles", 300, 0.5, 1)
    with pytest.raises(TextError, match=r"'.*text.txt' has 600 tokens, and --length 1500 takes 1,\d\d\d of them"):
        haystack.problems("needle", 1500, 0.5, 1)
    assert len(haystack.problems("needle", 800, 0.5, 1)) == 1
    path.write_text("")
    with pytest.raises(TextError, match="has 0 tokens"):
        Haystack(chat_tokenizer(), path).problems("needle", 800, 0.5, 1)
    with pytest.raises(EvaluationError, match="There is no kind 'nadel'"):
        haystack.problems("nadel", 800, 0.5, 1)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Haystack(chat_tokenizer(None)).problems("needle", 800, 0.5, 1)
    with pytest.raises(TextError, match="Cannot read the text"):
        Haystack(chat_tokenizer(), tmp_path / "none.txt")


def test_a_length_that_no_text_gives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixkvq.evaluate.retrieval.problems.fitting", lambda *_: None)
    with pytest.raises(EvaluationError, match="No part of the text makes a prompt of exactly --length 1000"):
        Haystack(chat_tokenizer()).problems("needle", 1000, 0.5, 1)


def test_the_built_in_text_is_repeated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixkvq.evaluate.retrieval.problems.read_text", lambda _: "One two three.\nFour.")
    assert len(Haystack(chat_tokenizer()).problems("needle", 1000, 0.5, 1)[0].tokens) == 985


# What is measured


def test_the_exact_cache_is_one_plain_forward_pass():
    model, tokenizer = tiny_model("llama"), chat_tokenizer()
    problems = Haystack(tokenizer).problems("needle", 600, 0.5, 2)
    cells = [retrieval(model, tokenizer, problems, EXACT, batch=batch)[0] for batch in (1, 2)]
    for cell in cells:
        for problem, reply in zip(problems, cell.replies, strict=True):
            tokens = torch.tensor([problem.tokens + problem.answer])
            with torch.inference_mode(), attention(model, "sdpa"):
                scored = model(tokens, use_cache=False).logits[0].log_softmax(-1)
            targets = torch.tensor(problem.answer)
            rows = scored[len(problem.tokens) - 1 : -1]
            expected = rows.gather(1, targets[:, None]).mean().item()
            assert reply.log_probability == pytest.approx(expected, abs=1e-4)
            assert reply.name == problem.name
    assert cells[0].log_probability == pytest.approx(cells[1].log_probability, abs=1e-4)
    assert [reply.text for reply in cells[0].replies] == [reply.text for reply in cells[1].replies]
    assert cells[0].bits == 32.0


def test_what_is_written_is_greedy():
    model, tokenizer = tiny_model("llama"), chat_tokenizer()
    problem = Haystack(tokenizer).problems("needles", 1100, 0.5, 1)[0]
    reply = retrieval(model, tokenizer, [problem], EXACT, batch=1)[0].replies[0]
    with torch.inference_mode(), attention(model, "sdpa"):
        out = model.generate(
            torch.tensor([problem.tokens]),
            attention_mask=torch.ones(1, len(problem.tokens)),
            max_new_tokens=len(problem.answer) + SPARE,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )
    assert reply.text == tokenizer.decode(out[0, len(problem.tokens) :], skip_special_tokens=True)


def test_question_and_answer_read_packed_pages():
    """The same as a prompt that was decoded token by token after its context, and not as one read at once."""
    model, tokenizer, config = tiny_model("llama"), chat_tokenizer(), MixKVQConfig.preset("kivi-2")
    problem = Haystack(tokenizer).problems("needle", 1024, 0.0, 1)[0]
    reply = retrieval(model, tokenizer, [problem], {"kivi-2": config}, batch=1)[0].replies[0]
    tokens = torch.tensor([problem.tokens + problem.answer])

    def log_probability(read_at_once: int) -> float:
        cache = MixKVQCache(model.config, config)
        with torch.inference_mode(), attention(model, "mixkvq"):
            logits = [model(tokens[:, :read_at_once], past_key_values=cache).logits[0]]
            logits += [model(token, past_key_values=cache).logits[0] for token in tokens[:, read_at_once:].split(1, 1)]
        scored = torch.cat(logits).log_softmax(-1)[len(problem.tokens) - 1 : -1]
        return scored.gather(1, torch.tensor(problem.answer)[:, None]).mean().item()

    assert reply.log_probability == pytest.approx(log_probability(problem.context), abs=1e-3)
    assert abs(reply.log_probability - log_probability(len(problem.tokens))) > 5e-3


class Parrot(Scripted):
    """Writes what ``reply`` makes of the prompt after the answer's beginning.

    Attributes:
        fed: lengths of what each cache was given.
    """

    def __init__(self, reply: Callable[[str], str]) -> None:
        super().__init__(reply)
        self.cache: object = None
        self.fed: list[list[int]] = []

    def __call__(self, tokens: torch.Tensor, *, past_key_values: MixKVQCache, **_: object) -> SimpleNamespace:
        if past_key_values is not self.cache:
            self.cache, self.rows = past_key_values, tokens[:, :0]
            self.fed.append([])
        self.fed[-1].append(tokens.shape[1])
        self.rows = torch.cat([self.rows.repeat_interleave(len(tokens) // len(self.rows), 0), tokens], 1)
        logits = torch.zeros(len(tokens), 1, VOCABULARY)
        for row, said in enumerate(map(str, map(chat_tokenizer().decode, self.rows))):
            prompt, _, begun = said.partition("assistant\n")
            written = re.sub(r"^.*?(in the text is|above are)", "", begun)
            rest = self.reply(prompt)[len(written) :]
            token = chat_tokenizer()(rest[0])["input_ids"][0] if rest else END
            logits[row, 0, token] = 9.0
        return SimpleNamespace(logits=logits)


def test_found_is_what_was_asked_for():
    problems = Haystack(chat_tokenizer()).problems("needle", 1024, 0.5, 3)
    (right,), (other,) = problems[0].wanted, problems[1].wanted
    model = Parrot(lambda prompt: f" {right}." if right in prompt else f" 1{other}" if other in prompt else "")
    cell = retrieval(model, chat_tokenizer(), problems, EXACT, batch=2)[0]
    assert [reply.found for reply in cell.replies] == [1.0, 0.0, 0.0]
    assert [reply.text for reply in cell.replies] == [f" {right}.", f" 1{other}", ""]
    assert cell.found == pytest.approx(1 / 3)
    assert cell.replies[0].log_probability == pytest.approx(0, abs=0.05)
    assert cell.replies[2].log_probability == pytest.approx(-9, abs=0.05)
    assert cell.bits is None
    # The context, the question up to the end of a block, the rest of it, and token by token; the second batch writes
    # nothing and is told the answer alone.
    context, prompt = min(problem.context for problem in problems[:2]), len(problems[0].tokens)
    first, second = model.fed
    assert first[:3] == [context, -context % 128, prompt - context - -context % 128]
    assert first[3:] == [1] * 8
    assert second[3:] == [1] * 6


def test_variables_are_found_one_by_one():
    problem = Haystack(chat_tokenizer()).problems("variables", 1024, 0.5, 1)[0]
    a, b, *_ = problem.wanted
    cell = retrieval(Parrot(lambda _: f" {a}, X{b}, {b}"), chat_tokenizer(), [problem], EXACT, batch=1)[0]
    assert cell.found == 0.4


def test_cells_and_progress():
    problems = [p for depth in depths(2) for p in Haystack(chat_tokenizer()).problems("needle", 1024, depth, 3)]
    seen: list[tuple[str, int]] = []
    caches = {"one": EXACT["bf16"], "two": EXACT["bf16"]}
    model = Parrot(lambda _: "no")
    cells = retrieval(model, chat_tokenizer(), problems, caches, batch=2, advance=lambda *each: seen.append(each))
    assert [(cell.cache, cell.depth) for cell in cells] == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert seen == [("one", 2048), ("one", 1024), ("two", 2048), ("two", 1024)] * 2
    assert [reply.name for reply in cells[2].replies] == [problem.name for problem in problems[3:]]


def cell(cache: str, depth: float, found: float, log_probability: float, kind: str = "needle") -> Cell:
    return Cell(cache, kind, 1024, depth, found, log_probability, 2.5, (Reply("name", found, log_probability, ""),))


def test_summaries():
    cells = [
        cell("bf16", 0, 1.0, -0.1), cell("k", 0, 0.5, -0.4), cell("bf16", 1, 0.9, -0.2), cell("k", 1, 0.9, -0.1),
        cell("bf16", 0, 0.0, -3.0, "needles"), cell("k", 0, 0.2, -2.0, "needles"),
    ]  # fmt: skip
    exact, k, unsure, k_unsure = summaries(cells)
    assert [(row.kind, row.cache) for row in (exact, k, unsure, k_unsure)] == [
        ("needle", "bf16"), ("needle", "k"), ("needles", "bf16"), ("needles", "k"),
    ]  # fmt: skip
    assert (exact.found, exact.sure, exact.difference) == (0.95, 1.0, 0.0)
    assert (k.found, k.sure, k.sure_cells, k.difference) == (0.7, 0.5, 1, pytest.approx(-0.1))
    assert (k_unsure.sure, k_unsure.sure_cells, k_unsure.difference) == (None, 0, 1.0)
    alone = summaries([cell("k", 0, 0.5, -0.4)])[0]
    assert (alone.found, alone.sure, alone.difference) == (0.5, None, None)
