"""Problems are made from their names, and their chains are right: every step is worked out again here."""

import re

import pytest

from mixkvq.evaluate.problems import FAMILIES, MIN_CHAIN, Problem, final_answer, make_problem, problem_set

EVERY = [make_problem(family, "unit", number) for family in FAMILIES for number in range(25)]


def of(family: str) -> list[Problem]:
    return [problem for problem in EVERY if problem.family == family]


def steps(problem: Problem) -> list[str]:
    *lines, last = problem.chain.splitlines()
    assert last == f"Answer: {problem.answer}"
    return lines


def test_a_name_is_a_problem():
    for problem in EVERY:
        family, split, number = problem.name.split("/")
        assert make_problem(family, split, int(number)) == problem
    assert len({problem.prompt for problem in EVERY}) == len(EVERY)
    assert make_problem("swaps", "unit", 1) != make_problem("swaps", "other", 1)


def test_sets_take_families_in_turn():
    problems = problem_set(20, split="unit")
    assert [problem.family for problem in problems[:9]] == list(FAMILIES)
    assert problems[0].name == "running-arithmetic/unit/0"
    assert problems[9].name == "running-arithmetic/unit/1"
    assert {problem.family for problem in problem_set(5, families=["swaps", "ledger"])} == {"swaps", "ledger"}


def test_lengths_are_spread_and_can_be_limited():
    lengths = sorted(len(problem.chain) for problem in EVERY)
    assert lengths[0] < 300
    assert lengths[-1] > 2500
    short = problem_set(90, split="unit", longest=150)
    assert max(len(problem.chain) for problem in short) < 1000
    with pytest.raises(KeyError):
        make_problem("nothing", "unit", 1)
    assert MIN_CHAIN == 100


def test_the_last_answer_counts():
    assert final_answer("Answer: 3\nAnswer:  a b \nmore") == "a b"
    assert final_answer("no") is None
    problem = EVERY[0]
    assert problem.solved_by(problem.chain)
    assert not problem.solved_by(problem.chain + "0")
    assert not problem.solved_by("")


@pytest.mark.parametrize("family", ["running-arithmetic", "assignments", "multiplication", "ledger"])
def test_sums_are_right(family: str):
    checked = 0
    for problem in of(family):
        modulus = 100 if family == "assignments" else 10**30
        for left, right in re.findall(r"(\d+(?: ?[-+*] ?\d+)+) ?= ?(\d+)", problem.chain):
            assert eval(left) % modulus == int(right), problem.name
            checked += 1
    assert checked > 100


def test_running_arithmetic_applies_the_terms_of_the_prompt():
    for problem in of("running-arithmetic"):
        start = int(re.match(r"Start with (\d+)", problem.prompt)[1])
        terms = re.findall(r"\d+:([+-]\d+)", problem.prompt)
        assert start + sum(map(int, terms)) == int(problem.answer)
        assert len(steps(problem)) == len(terms)


def test_assignments_evaluate():
    for problem in of("assignments"):
        values: dict[str, int] = {}

        def value(word: str, values: dict[str, int] = values) -> int:
            return int(word) if word.isdigit() else values[word]

        for name, expression in re.findall(r"^(\w\w) = (.*)$", problem.prompt, re.MULTILINE):
            left, *rest = expression.split()  # names may be words of Python's
            total = value(left)
            if rest:
                total += value(rest[1]) if rest[0] == "+" else -value(rest[1])
            values[name] = total % 100
        assert values[re.search(r"What is (\w\w)\?", problem.prompt)[1]] == int(problem.answer)


def test_multiplications_multiply():
    for problem in of("multiplication"):
        a, b = map(int, re.findall(r"\d+", problem.prompt))
        assert a * b == int(problem.answer)
        assert len(str(a)) == len(str(b))


def test_ledgers_keep_their_balances():
    for problem in of("ledger"):
        opening = problem.prompt.splitlines()[0]
        balances = {name: int(amount) for name, amount in re.findall(r"(\w+) (\d+)[,.]", opening)}
        for payer, payee, amount in re.findall(r"^\d+: (\w+) (\w+) (\d+)$", problem.prompt, re.MULTILINE):
            balances[payer] -= int(amount)
            balances[payee] += int(amount)
            assert balances[payer] >= 0
        assert balances[re.search(r"balance of (\w+)\?", problem.prompt)[1]] == int(problem.answer)


def test_swaps_swap():
    for problem in of("swaps"):
        row = re.match(r"Row: (.*)", problem.prompt)[1].split()
        for line in steps(problem):
            _, places, after = line.split(": ")
            i, j = (int(place) - 1 for place in places.split())
            row[i], row[j] = row[j], row[i]
            assert after.split() == row
        assert problem.answer.split() == row


def test_list_operations_do_what_they_say():
    for problem in of("list-operations"):
        items = re.match(r"List: (.*)", problem.prompt)[1].split()
        for line in steps(problem):
            _, operation, after = line.split(": ")
            word, _, rest = operation.partition(" ")
            items = {
                "append": [*items, rest],
                "insert": [rest, *items],
                "reverse": items[::-1],
                "rotate": items[1:] + items[:1],
                "drop": items[1:] if rest == "first" else items[:-1],
            }[word]
            assert after.split() == items
        assert problem.answer.split() == items


def test_tables_are_followed():
    for problem in of("table-lookup"):
        rows = {key: (int(n), to) for key, n, to in re.findall(r"^(\w+): (\d) -> (\w+)$", problem.prompt, re.MULTILINE)}
        at, count = re.search(r"Start at (\w+),.* first (\d+) rows", problem.prompt).groups()
        total = 0
        for _ in range(int(count)):
            number, to = rows[at]
            total, at = total + number, to
        assert total == int(problem.answer)
        assert len(steps(problem)) == int(count)


def test_machines_run():
    for problem in of("state-machine"):
        lines = re.findall(r"^([A-J]): (.*)$", problem.prompt, re.MULTILINE)
        table = {(state, cell[0]): cell[2] for state, cells in lines for cell in cells.split()}
        state = re.match(r"A machine in state (\w)", problem.prompt)[1]
        for symbol in re.findall(r" \d+:(\d)", problem.prompt):
            state = table[state, symbol]
        assert state == problem.answer


def test_walks_walk():
    moves = {"L": (-1, 0), "R": (1, 0), "U": (0, 1), "D": (0, -1)}
    for problem in of("grid-walk"):
        size = int(re.match(r"A grid of (\d)", problem.prompt)[1])
        cells = {(int(x), int(y)): int(n) for x, y, n in re.findall(r"(\d),(\d)=(\d)", problem.prompt)}
        x, y = map(int, re.search(r"Walk from (\d),(\d)", problem.prompt).groups())
        total = 0
        for move in re.findall(r" \d+:([LRUD])", problem.prompt):
            x, y = (x + moves[move][0]) % size, (y + moves[move][1]) % size
            total += cells[x, y]
        assert total == int(problem.answer)
