"""What a cache holds, counted from its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from mixkvq.quant.block import DENSE_BITS
from mixkvq.store.layout import PageLayout

#: Parts that are the packed pages; everything else is kept in the model's type, or keeps the books.
KEY_PARTS = ("key codes", "key scales", "key outliers", "tier index")
VALUE_PARTS = ("value codes", "value scales", "value outliers")
PACKED_PARTS = (*KEY_PARTS, *VALUE_PARTS)


@dataclass
class MemoryReport:
    """Bytes held, by part, and what they come to per element.

    Attributes:
        parts: bytes of the tensors really held: the packed parts (:data:`PACKED_PARTS`), ``sinks``, ``residual``
            (its room is allocated in blocks of R), ``statistics`` (running query sums), ``tables`` (block table,
            lengths), ``spare`` (room allocated ahead of need) and ``other layers`` (layers this package leaves alone:
            sliding windows and the like).
        packed_keys, packed_values: elements in pages.
        key_code_bits, value_code_bits: bits of their codes, each channel counted at its tier's width.
        elements: elements of all tokens seen by the quantized layers, keys and values together.
        evicted: those of them that are not held any more.
        counts_all: whether bits are those of everything held, as packed tokens alone do not say what the context costs:
            some were evicted, or a share of it is never packed while older tokens are.
        itemsize: bytes of a number in the model's type, which sinks and residual are held in.
    """

    parts: Counter[str] = field(default_factory=Counter)
    packed_keys: int = 0
    packed_values: int = 0
    key_code_bits: int = 0
    value_code_bits: int = 0
    elements: int = 0
    evicted: int = 0
    counts_all: bool = False
    itemsize: int = 2

    def __add__(self, other: MemoryReport) -> MemoryReport:
        return MemoryReport(
            self.parts + other.parts,
            self.packed_keys + other.packed_keys,
            self.packed_values + other.packed_values,
            self.key_code_bits + other.key_code_bits,
            self.value_code_bits + other.value_code_bits,
            self.elements + other.elements,
            self.evicted + other.evicted,
            self.counts_all or other.counts_all,
            max(self.itemsize, other.itemsize),
        )

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Assert that the parts are what these tensors hold."""
        held = sum(tensor.nbytes for tensor in tensors)
        assert held == self.total, f"the parts come to {self.total} bytes, the tensors to {held}"

    @property
    def total(self) -> int:
        """Bytes held, everything counted."""
        return sum(self.parts.values())

    @property
    def bf16(self) -> int:
        """Bytes of the same tokens in a BF16 cache."""
        return 2 * self.elements + self.parts["other layers"]

    @property
    def key_bits_codes(self) -> float:
        """Bits of code per packed key element: the papers' "effective bits"."""
        return self.key_code_bits / max(self.packed_keys, 1)

    @property
    def value_bits_codes(self) -> float:
        """Bits of code per packed value element."""
        return self.value_code_bits / max(self.packed_values, 1)

    @property
    def key_bits(self) -> float:
        """Honest bits per packed key element: codes, scales, zeros, outliers and tier index as they are stored."""
        return 8 * sum(self.parts[part] for part in KEY_PARTS) / max(self.packed_keys, 1)

    @property
    def value_bits(self) -> float:
        """Honest bits per packed value element."""
        return 8 * sum(self.parts[part] for part in VALUE_PARTS) / max(self.packed_values, 1)

    @property
    def bits(self) -> float:
        """Honest bits per packed element, over keys and values."""
        return 8 * sum(self.parts[p] for p in PACKED_PARTS) / max(self.packed_keys + self.packed_values, 1)

    @property
    def bits_held(self) -> float:
        """Bits per element over all tokens: :attr:`total` without other layers, sinks and residual included."""
        return 8 * (self.total - self.parts["other layers"]) / max(self.elements, 1)

    @property
    def sized_by_all(self) -> bool:
        """Whether :attr:`size_bits` are of everything held: of a cache that :attr:`counts_all`, or has none packed, as
        what is packed says nothing of the tokens seen then.
        """
        return self.counts_all or not self.packed_keys

    @property
    def size_bits(self) -> float:
        """What caches are compared by: :attr:`bits`; of a cache that is :attr:`sized_by_all`, what :attr:`bits_held`
        would be in a model of 16 bits.
        """
        if not self.sized_by_all:
            return self.bits
        beyond = (self.parts["sinks"] + self.parts["residual"]) * (1 - 2 / self.itemsize)
        return self.bits_held - 8 * beyond / max(self.elements, 1)

    @property
    def quantized_bits(self) -> float | None:
        """:attr:`size_bits`; None of a cache that has packed none yet and does not :attr:`counts_all`."""
        return self.size_bits if self.counts_all or self.packed_keys else None


def packed_report(layout: PageLayout, pages: int, promoted: dict[int, int]) -> MemoryReport:
    """Elements and bits of code in so many pages, with ``promoted`` channels of all of them together, by width."""
    per_page = layout.kv_heads * layout.tokens
    report = MemoryReport(
        packed_keys=pages * per_page * layout.key_dim,
        packed_values=pages * per_page * layout.value_dim,
        itemsize=layout.dense_dtype.itemsize,
    )
    report.key_code_bits = report.packed_keys * _code_bits(layout, layout.key_bits)
    report.value_code_bits = report.packed_values * _code_bits(layout, layout.value_bits)
    for bits, channels in promoted.items():
        report.key_code_bits += channels * layout.tokens * (bits - _code_bits(layout, layout.key_bits))
    return report


def _code_bits(layout: PageLayout, bits: int) -> int:
    return 8 * layout.dense_dtype.itemsize if bits == DENSE_BITS else bits
