"""Numbers: running arithmetic, long multiplication, a ledger of accounts.

A generator takes a source of randomness and about how many tokens the chain is to have, and returns the prompt and the
chain without its last line, and the answer. Token counts are of tokenizers that give every digit a token.
"""

from __future__ import annotations

from random import Random

NAMES = ["Ann", "Bob", "Cal", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo"]


def running_arithmetic(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Add and subtract the numbered terms of a list, one after the other."""
    count = min(max(tokens // 13, 4), 130)
    total = start = rng.randint(10, 99)
    terms, lines = [], []
    for step in range(1, count + 1):
        amount = rng.randint(2, 99)
        sign = "-" if total - amount >= 0 and (total + amount > 999 or rng.random() < 0.5) else "+"
        after = total + amount if sign == "+" else total - amount
        terms.append(f"{step}:{sign}{amount}")
        lines.append(f"{step}:{total}{sign}{amount}={after}")
        total = after
    prompt = f"Start with {start} and apply these in order. What is the result?\n{' '.join(terms)}"
    return prompt, "\n".join(lines), str(total)


def multiplication(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Multiply two numbers on paper: a row of products with carries for every digit, and sums with carries."""
    digits = min(max(round((tokens / 22) ** 0.5), 2), 8)
    a, b = (rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    lines, total = [], 0
    for place, digit in enumerate(reversed(str(b))):
        row, product = _times_digit(a, int(digit))
        shifted = product * 10**place
        lines.append(f"{digit}: {row} -> {product} -> {shifted}")
        if place:
            lines.append(f"{total}+{shifted}: {_sum(total, shifted)} -> {total + shifted}")
        total += shifted
    return f"Multiply {a} by {b} on paper.", "\n".join(lines), str(a * b)


def _times_digit(number: int, digit: int) -> tuple[str, int]:
    parts, carry = [], 0
    for d in reversed(str(number)):
        value = int(d) * digit + carry
        parts.append(f"{d}*{digit}+{carry}={value:02d}")
        carry = value // 10
    return " ".join(parts), number * digit


def _sum(a: int, b: int) -> str:
    width = max(len(str(a)), len(str(b)))
    parts, carry = [], 0
    for x, y in zip(reversed(str(a).zfill(width)), reversed(str(b).zfill(width)), strict=True):
        value = int(x) + int(y) + carry
        parts.append(f"{x}+{y}+{carry}={value:02d}")
        carry = value // 10
    return " ".join(parts)


def ledger(rng: Random, tokens: int) -> tuple[str, str, str]:
    """Follow numbered payments between accounts; every balance is found where its account was last named."""
    count = min(max(tokens // 22, 3), 90)
    names = rng.sample(NAMES, rng.randint(4, len(NAMES)))
    balances = {name: rng.randint(20, 99) for name in names}
    opening = ", ".join(f"{name} {balance}" for name, balance in balances.items())
    payments, lines = [], []
    for step in range(1, count + 1):
        payer = rng.choice([name for name in names if balances[name] >= 2])
        payee = rng.choice([name for name in names if name != payer])
        amount = rng.randint(1, min(balances[payer], 60))
        payments.append(f"{step}: {payer} {payee} {amount}")
        left, right = balances[payer], balances[payee]
        balances[payer], balances[payee] = left - amount, right + amount
        lines.append(f"{step}: {payer} {left}-{amount}={left - amount} {payee} {right}+{amount}={right + amount}")
    asked = rng.choice(names)
    prompt = (
        f"Balances: {opening}.\nEach line is a payment: payer, payee, amount.\n" + "\n".join(payments) + "\n"
        f"What is the balance of {asked}?"
    )
    return prompt, "\n".join(lines), str(balances[asked])
