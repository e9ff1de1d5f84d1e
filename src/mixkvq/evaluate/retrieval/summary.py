"""What a cache costs in retrieval, over all lengths and depths of a kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixkvq.bench import BF16
from mixkvq.evaluate.retrieval.measure import Cell, mean

#: Where full precision finds more than this share, a cache that finds less has lost something.
SURE = 0.9


@dataclass(frozen=True)
class Summary:
    """One cache and one kind.

    Attributes:
        cache, kind: as they were given.
        found: share of what was asked for, mean over lengths and depths.
        sure: the same where ``bf16`` finds more than :data:`SURE`; None if it does so nowhere, or was not asked.
        sure_cells: lengths and depths where it does.
        difference: mean log-probability of the right answer minus that with ``bf16``, in nats per token; None if that
            was not asked.
    """

    cache: str
    kind: str
    found: float
    sure: float | None
    sure_cells: int
    difference: float | None


def summaries(cells: Sequence[Cell]) -> list[Summary]:
    """A row for each kind and cache, in the order of the cells."""
    reference = {(cell.kind, cell.length, cell.depth): cell for cell in cells if cell.cache == BF16}
    pairs = dict.fromkeys((cell.kind, cell.cache) for cell in cells)
    return [_summary([cell for cell in cells if (cell.kind, cell.cache) == pair], reference) for pair in pairs]


def _summary(cells: Sequence[Cell], reference: dict[tuple[str, int, float], Cell]) -> Summary:
    pairs = [(cell, reference.get((cell.kind, cell.length, cell.depth))) for cell in cells]
    exact = [(cell, other) for cell, other in pairs if other is not None]
    sure = [cell.found for cell, other in exact if other.found > SURE]
    return Summary(
        cache=cells[0].cache,
        kind=cells[0].kind,
        found=mean(cell.found for cell in cells),
        sure=mean(sure) if sure else None,
        sure_cells=len(sure),
        difference=mean(cell.log_probability - other.log_probability for cell, other in exact) if exact else None,
    )
