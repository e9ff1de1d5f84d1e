"""Public sets of problems: their files, their grading, and what is said when something is missing."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixkvq.evaluate import errors
from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.tasks import BENCHMARKS, Mathematics, Question, Reasoner

ROWS = {
    "gsm8k": {"question": "What is 9 * 2?", "answer": "9 * 2 = <<9*2=18>>18.\n#### 1,018"},
    "math-500": {
        "problem": "Where?",
        "solution": "...",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "A",
    },
    "aime-2024": {"question": "How many?\n", "answer": "25"},
    "aime-2025": {"problem": "How many?", "answer": 70},
}
DATA = Path(os.environ.get("MIXKVQ_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write(folder: Path, name: str, *rows: object) -> Path:
    (folder / BENCHMARKS[name].file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "right", "texts", "wrong"),
    [
        ("gsm8k", "1,018", ["So \\boxed{1018}.", "\\boxed{\\$1,018}", "The answer is 1018."], ["\\boxed{18}", "?", ""]),
        (
            "math-500",
            "\\left( 3, \\frac{\\pi}{2} \\right)",
            ["$\\boxed{(3, \\pi/2)}$", "\\boxed{\\left(3,\\frac{\\pi}{2}\\right)}"],
            ["\\boxed{(3, \\pi)}", "\\boxed{(\\pi/2, 3)}", "\\boxed{"],
        ),
        ("aime-2024", "25", ["\\boxed{025}", "First 7.\n\\boxed{7}? No. I see.\nSo \\boxed{25}"], ["\\boxed{26}"]),
        ("aime-2025", "70", ["**Answer**: $\\boxed{70}$"], ["\\boxed{70.5}"]),
    ],
)
def test_grading(tmp_path: Path, name: str, right: str, texts: list[str], wrong: list[str]):
    task = Mathematics(name, folder=write(tmp_path, name, ROWS[name]))
    question = task.questions[0]
    assert (task.name, question.name, question.right) == (name, f"{name}/0", right)
    assert question.prompt.endswith("?\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert question.family == ("A" if name == "math-500" else "")
    assert all(task.grade(question, text) for text in texts)
    assert not any(task.grade(question, text) for text in wrong)


@pytest.mark.parametrize(
    ("right", "text"),
    [
        ("\\frac{3}{4}", "\\boxed{0.75}"),
        ("\\text{Evelyn}", "\\boxed{Evelyn}"),
        ("\\text{(C)}", "\\boxed{C}"),
        ("90^\\circ", "\\boxed{90}"),
        ("x^2+2x+1", "\\boxed{(x+1)^2}"),
        ("11,\\! 880", "\\boxed{11880}"),
    ],
)
def test_forms_of_the_same_answer(tmp_path: Path, right: str, text: str):
    task = Mathematics("math-500", folder=write(tmp_path, "math-500", {"problem": "?", "answer": right}))
    assert task.grade(task.questions[0], text)


def test_the_first_problems_and_the_room_for_answers(tmp_path: Path):
    folder = write(tmp_path, "aime-2024", *[{"question": str(n), "answer": n} for n in range(5)])
    task = Mathematics("aime-2024", folder=folder, count=2, samples=4, temperature=0.6, top_p=0.95)
    assert [question.right for question in task.questions] == ["0", "1"]
    assert (task.samples, task.temperature, task.top_p, task.room(None)) == (4, 0.6, 0.95, 32768)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "?", "answer": "#### 1"}\n{"question": ', "Line 2 of .* is not JSON"),
        ("[1]\n", "Line 1 of .* is not an object of fields"),
        ('{"text": "?", "answer": "#### 1"}\n', r"'question' \(or 'problem'\), and has answer, text"),
        ('\n{"question": "?"}\n', "Line 2 of .* is no problem: .* has question"),
        ('{"question": "?", "answer": "#### "}\n', "is no problem"),
        ("", "There are no problems in 'gsm8k_test.jsonl'"),
        (
            '{"question": "?", "answer": null}\n',
            "Line 1 of .* is no problem: its 'answer' is null, and has to be text or",
        ),
        ('{"question": "?", "answer": ["1"]}\n', r"its 'answer' is \[\"1\"\], and has to be text or a number"),
        ('{"question": "?", "answer": true}\n', "its 'answer' is true"),
    ],
)
def test_files_that_are_not_right(tmp_path: Path, content: str, message: str):
    (tmp_path / "gsm8k_test.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        Mathematics("gsm8k", folder=tmp_path)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_only_newlines_end_a_line(tmp_path: Path, ending: str):
    """Not what JSON allows within a text, though Python's splitlines() takes it for an end."""
    text = "a\u2028b\u2029c\x85d"
    lines = [json.dumps({"question": text, "answer": str(n)}, ensure_ascii=False) for n in range(2)]
    (tmp_path / "aime_2024.jsonl").write_bytes("".join(line + ending for line in lines).encode())
    questions = Mathematics("aime-2024", folder=tmp_path).questions
    assert [question.right for question in questions] == ["0", "1"]
    assert all(question.prompt.startswith(text) for question in questions)


def test_a_file_that_is_not_utf_8(tmp_path: Path):
    content = '{"question": "1?", "answer": 1}\n{"question": "Où?", "answer": 1}\n'
    (tmp_path / "aime_2024.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        EvaluationError, match=r"Line 2 of .*aime_2024.jsonl' is not UTF-8: .* Convert the file to UTF-8"
    ):
        Mathematics("aime-2024", folder=tmp_path)


def test_a_folder_without_the_file(tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"There is no aime_2025.jsonl in .* --data-dir, .* load math-ai/aime25"):
        Mathematics("aime-2025", folder=tmp_path)


def test_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(path: str, subset: str | None, split: str) -> list[dict]:
        asked.append((path, subset, split))
        if len(asked) > 1:
            raise ConnectionError("no route")
        return [ROWS["gsm8k"]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert Mathematics("gsm8k").questions[0].right == "1,018"
    with pytest.raises(EvaluationError, match=r"HuggingFaceH4/MATH-500 .* no route. .* math500_test.jsonl with --data"):
        Mathematics("math-500")
    assert asked == [("openai/gsm8k", "main", "test"), ("HuggingFaceH4/MATH-500", None, "test")]


@pytest.mark.parametrize("package", ["math_verify", "scipy.stats"])
def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EvaluationError, match=rf"\({package} is missing\): pip install \"mixkvq\[eval\]\""):
        errors.needed(package)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("from installed_package import nothing", "cannot import name 'nothing' from"),
        ("raise ImportError('libfoo.so: not found')", "libfoo.so: not found"),
    ],
)
def test_packages_that_are_there_but_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, cause: str):
    (tmp_path / "installed_package.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EvaluationError, match="installed_package, which is installed but could not") as raised:
        errors.needed("installed_package")
    assert cause in str(raised.value)
    assert "is missing" not in str(raised.value)
    with pytest.raises(EvaluationError, match=r"\(no_such_package.part is missing\)"):
        errors.needed("no_such_package.part")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the sets as files: set MIXKVQ_DATA")
@pytest.mark.parametrize(("name", "count"), [("gsm8k", 1319), ("math-500", 500), ("aime-2024", 30), ("aime-2025", 30)])
def test_the_real_sets(name: str, count: int):
    task = Mathematics(name, folder=DATA)
    assert len(task.questions) == len({question.name for question in task.questions}) == count
    for question in task.questions[:20]:
        assert task.grade(question, f"So the answer is $\\boxed{{{question.right}}}$."), question.right


def test_a_reasoners_problems():
    task = Reasoner(4, families=["swaps", "ledger", "swaps"])
    names = ["swaps/test/0", "ledger/test/0", "swaps/test/1", "ledger/test/1"]
    assert [question.name for question in task.questions] == names
    assert Reasoner(1, longest=200).questions[0].name == "running-arithmetic/test/0/200"
    assert task.room(100) == 174
    question = Question("q", "?", "12", chain="12 = 12\nAnswer: 12")
    assert task.grade(question, "Answer: 3\nAnswer: 12\n")
    for text in ("12", "Answer: 120", "Answer: 12\nAnswer: 3", ""):
        assert not task.grade(question, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ["swap"]}, "There is no family 'swap'. Known: running-arithmetic, "),
        ({"count": 0}, "0 problems: ask for at least one"),
        ({"longest": 40}, "Chains of up to 40 tokens: the shortest ones take 100"),
    ],
)
def test_problems_that_cannot_be_made(options: dict, message: str):
    with pytest.raises(EvaluationError, match=message):
        Reasoner(**{"count": 1, **options})
