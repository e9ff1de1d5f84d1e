"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from mixkvq.bench.decode import DecodeRow
from mixkvq.calibrate.search import Point
from mixkvq.config import MixKVQConfig, all_presets
from mixkvq.evaluate.accuracy import Accuracy
from mixkvq.evaluate.fidelity import Fidelity
from mixkvq.evaluate.likelihood import LENGTHS, ChainFidelity
from mixkvq.evaluate.statistics import pareto_front
from mixkvq.layers.expected import expected_bits, expected_kernel
from mixkvq.policies import policy_class
from mixkvq.store import MemoryReport


def size(count: float) -> str:
    """Bytes for people: 13.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(columns[0], overflow="fold", min_width=9)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def fidelity_table(rows: Sequence[Fidelity]) -> Table:
    """Rows by rising size in bits; key and value bits are codes / honest. Caches that none beats in both size and KL
    are in bold.
    """
    front = pareto_front([(row.size_bits, row.kl) for row in rows])
    reference = rows[0].reference_perplexity
    title = f"Fidelity over {rows[0].tokens:,} tokens; full precision has perplexity {reference:.3f}"
    table = new_table(title, "cache", "key bits", "values", "bits", "held", "perpl.", "KL", "top-1")
    for i, row in enumerate(rows):
        table.add_row(
            f"[bold]{escape(row.cache)}[/]" if i in front and len(rows) > 1 else escape(row.cache),
            f"{row.key_bits_codes:.2f}/{row.key_bits:.2f}",
            f"{row.value_bits_codes:.2f}/{row.value_bits:.2f}",
            f"{row.size_bits:.2f}" + "*" * row.sized_by_all,
            size(row.bytes_held),
            f"{row.perplexity:.3f}",
            f"{max(row.kl, 0):.4f}",
            f"{row.top1_agreement:.1%}",
        )
    if any(row.sized_by_all for row in rows):
        table.caption = (
            "* tokens were evicted, or kept unpacked: all bits held, over all tokens seen, in a model of 16 bits"
        )
    return table


def chain_table(rows: Sequence[ChainFidelity]) -> Table:
    """Right chains by rising honest bits; nats are per chain."""
    classes = ["short", "middle", "long"]
    title = (
        f"Right chains of {len(rows[0].scores):,} problems; short is up to {LENGTHS[0]}, long above {LENGTHS[1]} tokens"
    )
    table = new_table(title, "cache", "bits", "nats", "median", "exact", *classes)
    for row in rows:
        by_length = ("" if nats is None else f"{nats:.3f}" for nats in row.by_length)
        table.add_row(
            escape(row.cache),
            f"{row.bits:.2f}",
            f"{row.nats_per_chain:.3f}",
            f"{row.median:.3f}",
            f"{row.exact:.1%}",
            *by_length,
        )
    return table


def calibration_table(cache: str, uniform: Mapping[str, float], found: Mapping[str, float]) -> Table:
    """What was found beside what it started from, on text that was not calibrated on."""
    table = new_table("On text that was not calibrated on", "cache", "honest bits", "perpl.", "KL")
    for name, row in ((cache, uniform), ("calibrated", found)):
        table.add_row(escape(name), f"{row['bits']:.2f}", f"{row['perplexity']:.3f}", f"{row['kl']:.4f}")
    return table


def front_table(title: str, what: str, points: Mapping[str, Point], loss: str, bits: str = "bits") -> Table:
    """Points of a search by name: bits, and what they lose.

    Args:
        what, loss, bits: headings of the columns; the last says which bits the search is by.
    """
    table = new_table(title, what, bits, loss)
    for name, point in points.items():
        table.add_row(name, f"{point.bits:.2f}", f"{point.loss:.4f}")
    return table


def accuracy_table(title: str, rows: Sequence[Accuracy]) -> Table:
    """Accuracies in percent; the difference to full precision is in points."""
    columns = ["cache", "right", "95%", "to bf16", "p", "exact", "cut off", "tokens", "bits"]
    shown = {"to bf16": any(row.difference for row in rows), "exact": any(row.exact is not None for row in rows)}
    shown["p"] = shown["to bf16"]
    kept = [column for column in columns if shown.get(column, True)]
    table = new_table(title, *kept)
    for row in rows:
        cells = {
            "cache": escape(row.cache),
            "right": f"{row.accuracy:.1%}",
            "95%": f"{100 * row.low:.1f} to {100 * row.high:.1f}",
            "to bf16": "" if row.difference is None else f"{row.difference.points:+.1f}",
            "p": "" if row.difference is None else f"{row.difference.p:.2g}",
            "exact": "" if row.exact is None else f"{row.exact:.1%}",
            "cut off": f"{row.cut_off:.1%}",
            "tokens": f"{row.new_tokens:,.0f}",
            "bits": "" if row.bits is None else f"{row.bits:.2f}",
        }
        table.add_row(*(cells[column] for column in kept))
    return table


def decode_table(rows: Sequence[DecodeRow]) -> Table:
    """One decode step of every cache at every context."""
    table = new_table(
        "One decode step of the whole model; sizes against 16 bits",
        "cache",
        "type",
        "context",
        "step",
        "of stock",
        "held",
        "smaller",
    )
    for row in rows:
        table.add_row(
            escape(row.cache),
            row.dtype,
            f"{row.context:,}",
            f"{row.step_ms:.1f} ms",
            f"{row.time_ratio:.2f}x",
            size(row.bytes_held),
            f"{row.bytes_ratio:.2f}x",
        )
    return table


def memory_table(report: MemoryReport) -> Table:
    """Where the bytes are."""
    table = new_table("Bytes of the cache", "part", "bytes", "share")
    for part, held in sorted(report.parts.items(), key=lambda item: -item[1]):
        if held:
            table.add_row(part, size(held), f"{held / report.total:.0%}")
    table.add_section()
    table.add_row("all", size(report.total), "")
    table.add_row("BF16 cache of the same tokens", size(report.bf16), "")
    return table


def presets_table(kv_heads: int = 8, head_dim: int = 128) -> Table:
    """The presets, with the bits that they take in a BF16 model of the given shape, and what a GPU reads them with."""
    table = new_table(
        f"Caches; bits per element at {kv_heads} KV heads of dimension {head_dim}",
        "name", "keys", "values", "GPU", "what it is", "source",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    for column in table.columns[3:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    for name, preset in all_presets().items():
        config = MixKVQConfig.preset(name)
        keys, values, final = expected_bits(config, kv_heads, head_dim)
        kernel = expected_kernel(config, kv_heads, head_dim)
        floor, mark = "" if final else "from ", _bits_mark(config)
        table.add_row(name, f"{floor}{keys:.2f}{mark}", f"{values:.2f}{mark}", kernel, preset.summary, preset.source)
    table.caption_justify = "left"
    table.caption = (
        "* of the packed tokens alone: others stay in 16 bits, or are evicted, and `mixkvq fidelity` counts all bits "
        "held (docs/kvmix.md, docs/conf_kv.md)\n"
        "** once the cache is full: it begins with 16 bits and comes to these at plan_tokens (docs/pm_kvq.md)"
    )
    return table


def _bits_mark(config: MixKVQConfig) -> str:
    """The footnote of :func:`presets_table` that the bits of a configuration need, or nothing."""
    policy = policy_class(config.policy)(config)
    if policy.narrows:
        return "**"
    return "*" if policy.evicts or policy.recent else ""
