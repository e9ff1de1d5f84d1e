"""Lists: swaps of places, and a program of list operations.

For what a generator takes and returns see :mod:`mixkvq.evaluate.problems.arithmetic`.
"""

from __future__ import annotations

import string
from random import Random


def swaps(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Apply numbered swaps to a row of letters, writing the row down after each."""
    size = rng.randint(4, 9)
    count = min(max(tokens // (size + 8), 3), 100)
    row = rng.sample(string.ascii_lowercase, size)
    first = " ".join(row)
    given, lines = [], []
    for step in range(1, count + 1):
        i, j = rng.sample(range(size), 2)
        row[i], row[j] = row[j], row[i]
        given.append(f"{step}: {i + 1} {j + 1}")
        lines.append(f"{step}: {i + 1} {j + 1}: {' '.join(row)}")
    prompt = f"Row: {first}\nEach line swaps two places of the row, counted from 1.\n" + "\n".join(given)
    return prompt, "\n".join(lines), " ".join(row)


def list_operations(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Run numbered operations on a list of numbers, writing the list down after each."""
    count = min(max(tokens // 24, 3), 75)
    items = [rng.randint(10, 99) for _ in range(rng.randint(3, 6))]
    first = " ".join(map(str, items))
    given, lines = [], []
    for step in range(1, count + 1):
        choices = ["reverse", "rotate"]
        if len(items) < 7:
            choices += ["append", "insert"]
        if len(items) > 3:
            choices += ["drop first", "drop last"]
        operation = rng.choice(choices)
        if operation in ("append", "insert"):
            number = rng.randint(10, 99)
            items = [*items, number] if operation == "append" else [number, *items]
            operation = f"{operation} {number}"
        elif operation == "reverse":
            items = items[::-1]
        elif operation == "rotate":
            items = [*items[1:], items[0]]
        else:
            items = items[1:] if operation == "drop first" else items[:-1]
        given.append(f"{step}: {operation}")
        lines.append(f"{step}: {operation}: {' '.join(map(str, items))}")
    prompt = (
        f"List: {first}\nInsert puts a number in front, append at the end, rotate moves the first number to the end.\n"
        + "\n".join(given)
    )
    return prompt, "\n".join(lines), " ".join(map(str, items))
