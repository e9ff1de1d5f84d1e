"""One layer's tokens in a cache that evicts: what is left of each sequence, without gaps.

The newest tokens and the sinks are held in the model's type. When a block of tokens has left the window it is packed:
INT8 codes, and a scale per block, head and channel, which is set then and stays. Evicted tokens are cut out of the
tensors, and a block's scales go with the last of its tokens. Tensors are replaced, never written to, so sequences
that were copied share theirs until they part. Padding is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixkvq.quant.int8 import quantize_int8
from mixkvq.store.memory import MemoryReport


@dataclass(frozen=True)
class PackedTokens:
    """Tokens in INT8, oldest first.

    Attributes:
        key_codes, value_codes: ``[Hkv, n, D]`` int8.
        key_scales, value_scales: ``[blocks, Hkv, D]``.
        block: ``[n]`` int32, the block whose scales a token has; rises from 0 without gaps.
    """

    key_codes: Tensor
    value_codes: Tensor
    key_scales: Tensor
    value_scales: Tensor
    block: Tensor

    @property
    def length(self) -> int:
        return self.block.shape[0]

    def select(self, index: Tensor) -> PackedTokens:
        """The tokens ``index``, which rise, and the scales of the blocks that they are of."""
        blocks, block = self.block[index].unique(return_inverse=True)
        return PackedTokens(
            self.key_codes[:, index],
            self.value_codes[:, index],
            self.key_scales[blocks],
            self.value_scales[blocks],
            block.int(),
        )

    def with_block(self, keys: Tensor, values: Tensor) -> PackedTokens:
        """These and a new block ``keys, values [Hkv, G, D]``."""
        key_codes, key_scales = quantize_int8(keys, self.key_scales.dtype)
        value_codes, value_scales = quantize_int8(values, self.value_scales.dtype)
        number = self.block.new_full((keys.shape[1],), self.key_scales.shape[0])
        return PackedTokens(
            torch.cat([self.key_codes, key_codes], 1),
            torch.cat([self.value_codes, value_codes], 1),
            torch.cat([self.key_scales, key_scales[None]]),
            torch.cat([self.value_scales, value_scales[None]]),
            torch.cat([self.block, number]),
        )

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv, n, D]`` float32."""
        pairs = (self.key_codes, self.key_scales), (self.value_codes, self.value_scales)
        keys, values = (codes * scales[self.block].float().transpose(0, 1) for codes, scales in pairs)
        return keys, values


@dataclass(frozen=True)
class HeldTokens:
    """What is held of one sequence: packed tokens, then sinks and window, each by rising position.

    Attributes:
        keys, values: ``[Hkv, m, D]``, sinks and window in the model's type.
        steps: ``[n + m]`` int32, each token's number in its sequence.
        mass: ``[n + m]`` float32, the attention it gets; None for policies that do not ask.
        seen: tokens that the sequence has had, evicted ones included.
    """

    packed: PackedTokens
    keys: Tensor
    values: Tensor
    steps: Tensor
    mass: Tensor | None
    seen: int

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.steps.shape[0]

    def extend(self, keys: Tensor, values: Tensor, mass: Tensor | None) -> HeldTokens:
        """With new tokens ``keys, values [Hkv, L, D]``; ``mass`` of all, these included."""
        seen = self.seen + keys.shape[1]
        return replace(
            self,
            keys=torch.cat([self.keys, keys.to(self.keys.dtype)], 1),
            values=torch.cat([self.values, values.to(self.values.dtype)], 1),
            steps=torch.cat([self.steps, torch.arange(self.seen, seen, dtype=torch.int32, device=keys.device)]),
            mass=mass,
            seen=seen,
        )

    def select(self, index: Tensor) -> HeldTokens:
        """The tokens ``index``, which rise; the others are evicted."""
        old = index < self.packed.length
        dense = index[~old] - self.packed.length
        return replace(
            self,
            packed=self.packed.select(index[old]) if self.packed.length else self.packed,
            keys=self.keys[:, dense],
            values=self.values[:, dense],
            steps=self.steps[index],
            mass=None if self.mass is None else self.mass[index],
        )

    def without_last(self, count: int) -> HeldTokens:
        """As if the newest ``count`` tokens had not come; none may have been evicted."""
        seen = self.seen - count
        return replace(self.select((self.steps < seen).nonzero().flatten()), seen=seen)

    def pack(self, sinks: int, window: int, group: int) -> HeldTokens:
        """With the oldest tokens packed in blocks of ``group``, as long as ``window`` tokens and the sinks stay."""
        held = self
        while held.keys.shape[1] >= sinks + window + group:
            n, m = held.packed.length, held.keys.shape[1]
            rest = torch.cat([torch.arange(sinks), torch.arange(sinks + group, m)]).to(held.keys.device)
            block = torch.arange(sinks, sinks + group, device=rest.device)
            order = torch.cat([torch.arange(n, device=rest.device), n + block, n + rest])
            held = replace(
                held,
                packed=held.packed.with_block(held.keys[:, block], held.values[:, block]),
                keys=held.keys[:, rest],
                values=held.values[:, rest],
                steps=held.steps[order],
                mass=None if held.mass is None else held.mass[order],
            )
        return held

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv, n + m, D]`` in the model's type, or in float32 where tokens are packed."""
        if not self.packed.length:
            return self.keys, self.values
        keys, values = self.packed.dequantize()
        return torch.cat([keys, self.keys.float()], 1), torch.cat([values, self.values.float()], 1)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is held, with the part of the :class:`MemoryReport` that it counts for."""
        yield from (("key codes", self.packed.key_codes), ("value codes", self.packed.value_codes))
        yield from (("key scales", self.packed.key_scales), ("value scales", self.packed.value_scales))
        yield from (("residual", self.keys), ("residual", self.values))
        yield from (("tables", self.packed.block), ("tables", self.steps))
        if self.mass is not None:
            yield "statistics", self.mass


class EvictingStore:
    """The tokens held of a batch, each sequence for itself.

    Args:
        batch: sequences.
        kv_heads, key_dim, value_dim: shape of a token.
        dtype: the model's type.
        param_dtype: the type of scales.
        mass: whether attention mass is kept.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype,
        param_dtype: torch.dtype,
        mass: bool,
        device: torch.device,
    ) -> None:
        self.token_elements = kv_heads * (key_dim + value_dim)

        self.dtype = dtype

        def zeros(*shape: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=kind, device=device)

        packed = PackedTokens(
            zeros(kv_heads, 0, key_dim, kind=torch.int8),
            zeros(kv_heads, 0, value_dim, kind=torch.int8),
            zeros(0, kv_heads, key_dim, kind=param_dtype),
            zeros(0, kv_heads, value_dim, kind=param_dtype),
            zeros(0, kind=torch.int32),
        )
        keys, values = (zeros(kv_heads, 0, dim, kind=dtype) for dim in (key_dim, value_dim))
        nothing = zeros(0, kind=torch.float32) if mass else None
        self.rows = [HeldTokens(packed, keys, values, zeros(0, kind=torch.int32), nothing, 0)] * batch

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens held of each sequence."""
        return [row.length for row in self.rows]

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given sequences, in that order, repeats allowed."""
        self.rows = [self.rows[row] for row in rows]

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held, once."""
        return list({id(tensor): tensor for row in self.rows for _, tensor in row.parts()}.values())

    def memory(self) -> MemoryReport:
        """Bytes held, by part; tensors that sequences share count once."""
        report = MemoryReport(counts_all=True, itemsize=self.dtype.itemsize)
        shared = {id(tensor): (part, tensor) for row in self.rows for part, tensor in row.parts()}
        for part, tensor in shared.values():
            report.parts[part] += tensor.nbytes
        report.packed_keys = report.parts["key codes"]  # a byte each
        report.packed_values = report.parts["value codes"]
        report.key_code_bits, report.value_code_bits = 8 * report.packed_keys, 8 * report.packed_values
        report.elements = sum(row.seen for row in self.rows) * self.token_elements
        report.evicted = sum(row.seen - row.length for row in self.rows) * self.token_elements
        report.check(self.tensors())
        return report
