"""Tables of the GPU measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from mixkvq.report.tables import new_table, size

if TYPE_CHECKING:  # their modules need Triton, which not every machine has
    from mixkvq.bench.capacity import CapacityRow
    from mixkvq.bench.generate import GenerateRow
    from mixkvq.bench.kernel import KernelRow
    from mixkvq.bench.prefill import PrefillRow


def kernel_table(rows: Sequence[KernelRow]) -> Table:
    """One kernel a row, at every shape."""
    first = rows[0]
    shape = f"{first.kv_heads} KV heads of dimension {first.head_dim}, {first.group} query heads each"
    table = new_table(
        f"Attention of one decode step of one layer; {shape}; copies run at {first.copy_gb_per_s:,.0f} GB/s",
        "cache", "kernel", "batch", "context", "time", "read", "GB/s", "of copy", "speed-up", "error",
    )  # fmt: skip
    _words(table, 1)
    for row in rows:
        table.add_row(
            escape(row.cache),
            row.kernel,
            f"{row.batch}",
            f"{row.context:,}",
            f"{row.time_us:.1f} us",
            size(row.bytes_read),
            f"{row.gb_per_s:,.0f}",
            f"{row.copy_share:.0%}",
            f"{row.speed_up:.2f}x",
            f"{row.error:.1e}",
        )
    return table


def generate_table(rows: Sequence[GenerateRow], model: str) -> Table:
    """One cache a row, at every batch and context."""
    table = new_table(
        f"Decoding with {model}, whose weights take {size(rows[0].weight_bytes)}",
        "cache", "kernel", "batch", "context", "step", "tokens/s", "speed-up", "peak", "cache size", "flushes",
    )  # fmt: skip
    _words(table, 1)
    for row in rows:
        figures = ["out of memory", "", "", "", "", ""]
        if row.steps:
            figures = [
                f"{row.step_ms:.2f} ms",
                f"{row.tokens_per_second:,.0f}",
                f"{row.speed_up:.2f}x" if row.speed_up else "",
                size(row.peak_bytes) if row.peak_bytes else "",
                size(row.cache_bytes),
                _share(row.flush_share),
            ]
        table.add_row(escape(row.cache), row.kernel, f"{row.batch}", f"{row.context:,}", *figures)
    return table


def capacity_table(rows: Sequence[CapacityRow], model: str) -> Table:
    """One cache a row, at its largest batch."""
    first = rows[0]
    table = new_table(
        f"The most sequences of {first.context:,} tokens of {model} in {size(first.memory)}",
        "cache", "kernel", "batch", "of BF16", "step", "tokens/s", "speed-up", "peak", "cache size", "flushes",
    )  # fmt: skip
    _words(table, 1)
    for row in rows:
        table.add_row(
            escape(row.cache),
            row.kernel,
            f"{row.batch}",
            f"{row.batch_ratio:.2f}x",
            f"{row.step_ms:.2f} ms",
            f"{row.tokens_per_second:,.0f}",
            f"{row.speed_up:.2f}x",
            size(row.peak_bytes) if row.peak_bytes else "",
            size(row.cache_bytes),
            _share(row.flush_share),
        )
    return table


def prefill_table(rows: Sequence[PrefillRow], model: str) -> Table:
    """One cache a row, at every batch and context."""
    table = new_table(
        f"Reading a prompt with {model}", "cache", "batch", "context", "time", "tokens/s", "of BF16", "peak"
    )
    for row in rows:
        table.add_row(
            escape(row.cache),
            f"{row.batch}",
            f"{row.context:,}",
            f"{1e3 * row.seconds:,.0f} ms",
            f"{row.tokens_per_second:,.0f}",
            f"{row.time_ratio:.2f}x",
            size(row.peak_bytes) if row.peak_bytes else "",
        )
    return table


def _words(table: Table, column: int) -> None:
    """A column of words rather than figures."""
    table.columns[column].justify, table.columns[column].no_wrap = "left", False


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
