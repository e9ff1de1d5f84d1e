"""Look-ups: chains of assignments, tables that point at themselves, state machines, walks on a grid.

For what a generator takes and returns see :mod:`mixkvq.evaluate.problems.arithmetic`.
"""

from __future__ import annotations

import string
from random import Random

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def assignments(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Evaluate variables, each from one or two before it, with the value of each kept in the chain alone."""
    count = min(max(tokens // 20, 4), 90)
    names = rng.sample([a + b for a in string.ascii_lowercase for b in string.ascii_lowercase], count)
    values: dict[str, int] = {}
    given, lines = [], []
    for name in names:
        known = list(values)
        if len(known) < 2 or rng.random() < 0.1:
            values[name] = rng.randint(1, 99)
            given.append(f"{name} = {values[name]}")
            lines.append(f"{name} = {values[name]}")
            continue
        left = rng.choice(known)
        right = rng.choice(known) if rng.random() < 0.4 else str(rng.randint(1, 49))
        a, b = values[left], values.get(right, int(right) if right.isdigit() else 0)
        sign = "-" if a >= b and (a + b > 99 or rng.random() < 0.5) else "+"
        values[name] = (a + b if sign == "+" else a - b) % 100
        given.append(f"{name} = {left} {sign} {right}")
        lines.append(f"{name} = {left} {sign} {right} = {a} {sign} {b} = {values[name]}")
    asked = names[-1]
    prompt = "All numbers are modulo 100.\n" + "\n".join(given) + f"\nWhat is {asked}?"
    return prompt, "\n".join(lines), str(values[asked])


def table_lookup(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Follow a table's pointers from row to row and add up what stands there."""
    steps = min(max(tokens // 15, 4), 125)
    rows = rng.randint(8, 75)
    keys = rng.sample([a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS], rows)
    numbers = {key: rng.randint(1, 9) for key in keys}
    follows = dict(zip(keys, keys[1:] + keys[:1], strict=True))  # one cycle through all rows
    table = "\n".join(f"{key}: {numbers[key]} -> {follows[key]}" for key in sorted(keys))
    start = at = rng.choice(keys)
    lines, total = [], 0
    for step in range(1, steps + 1):
        total += numbers[at]
        lines.append(f"{step}: {at} {numbers[at]} total {total}")
        at = follows[at]
    prompt = f"{table}\nStart at {start}, follow the arrows, and add the numbers of the first {steps} rows."
    return prompt, "\n".join(lines), str(total)


def state_machine(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Run a machine: the next state stands in a table, by the state and a numbered input."""
    count = min(max(tokens // 9, 5), 150)
    states = string.ascii_uppercase[: rng.randint(4, 10)]
    symbols = "0123"[: rng.randint(2, 4)]
    rule = {(state, symbol): rng.choice(states) for state in states for symbol in symbols}
    table = "\n".join(f"{state}: " + " ".join(f"{x}>{rule[state, x]}" for x in symbols) for state in states)
    start = state = rng.choice(states)
    inputs, lines = [], []
    for step in range(1, count + 1):
        symbol = rng.choice(symbols)
        inputs.append(f"{step}:{symbol}")
        lines.append(f"{step}: {state} {symbol} {rule[state, symbol]}")
        state = rule[state, symbol]
    prompt = f"A machine in state {start} moves by this table.\n{table}\nInputs: {' '.join(inputs)}\nWhere does it end?"
    return prompt, "\n".join(lines), state


def grid_walk(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Walk on a grid whose edges are joined, and add up the numbers found."""
    count = min(max(tokens // 16, 4), 115)
    size = rng.randint(3, 7)
    cells = {(x, y): rng.randint(1, 9) for x in range(size) for y in range(size)}
    order = list(cells)
    rng.shuffle(order)
    listed = " ".join(f"{x},{y}={cells[x, y]}" for x, y in order)
    ways = {"L": (-1, 0), "R": (1, 0), "U": (0, 1), "D": (0, -1)}
    x, y = start = rng.choice(order)
    moves, lines, total = [], [], 0
    for step in range(1, count + 1):
        move = rng.choice("LRUD")
        dx, dy = ways[move]
        x, y = (x + dx) % size, (y + dy) % size
        total += cells[x, y]
        moves.append(f"{step}:{move}")
        lines.append(f"{step}: {move} {x},{y} {cells[x, y]} total {total}")
    prompt = (
        f"A grid of {size} by {size} with joined edges: {listed}\nWalk from {start[0]},{start[1]}: {' '.join(moves)}\n"
        "Add the numbers of all cells you enter."
    )
    return prompt, "\n".join(lines), str(total)
