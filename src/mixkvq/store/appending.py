"""Tokens on their way into pages: complete blocks, and where the tokens of a prompt go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixkvq.store.books import blocks_of

#: Numbers in the keys of blocks of different sequences beyond which no more are put together.
JOINED = 1 << 22


@dataclass(frozen=True)
class FullBlocks:
    """Blocks that are complete and wait to be quantized: ``keys, values [N, Hkv, R, D]``, ``sequences`` N rows."""

    keys: Tensor
    values: Tensor
    sequences: list[int]

    @classmethod
    def joined(cls, parts: Iterable[FullBlocks]) -> Iterator[FullBlocks]:
        """The same in as few as need be for the size of a copy to stay bounded."""
        together: list[FullBlocks] = []
        for part in parts:
            together.append(part)
            if sum(blocks.keys.numel() for blocks in together) >= JOINED:
                yield cls._cat(together)
                together = []
        if together:
            yield cls._cat(together)

    @classmethod
    def _cat(cls, parts: Sequence[FullBlocks]) -> FullBlocks:
        if len(parts) == 1:
            return parts[0]
        keys, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values"))
        return cls(keys, values, [row for part in parts for row in part.sequences])


@dataclass(frozen=True)
class BlockSource:
    """Complete blocks in a larger tensor: block ``i`` is ``keys[rows[i], :, starts[i] : starts[i] + R]``.

    Attributes:
        keys, values: ``[X, Hkv, T, D]``.
        rows, starts: ``[N]`` int32.
        sequences: ``[X]`` int64, the sequence that each row of ``keys`` belongs to.
        first: ``[N]`` int64, the number in its sequence of each block's first token.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    starts: Tensor
    sequences: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, tokens: int, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Copies ``[n, Hkv, R, D]`` of the keys and values, at most ``size`` blocks at once, and which blocks."""
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            rows = self.rows[part].long()[:, None]
            at = self.starts[part].long()[:, None] + torch.arange(tokens, device=rows.device)
            yield part, self.keys[rows, :, at].transpose(1, 2), self.values[rows, :, at].transpose(1, 2)


@dataclass(frozen=True)
class AppendPlan:
    """Which new tokens complete which blocks, and which dense slots the others go to.

    "Source positions" count the dense slots first and the new tokens after them.

    Attributes:
        lengths: of all sequences afterwards.
        sequences: ``[N]`` int64, the batch row of each block.
        columns: ``[N]`` int64, its place in the sequence's block table; ``first [N]`` int64, its first token's number.
        pages: of each block; ``numbers [N]`` int32 is the same on the device.
        positions: ``[N, R]`` int64, source positions of each block's tokens.
        whole: whether every block is a run of new tokens, so that nothing needs to be gathered.
        rows, slots, tokens: ``[M]`` int64: new token ``tokens[i]`` of sequence ``rows[i]`` goes to ``slots[i]``.
    """

    lengths: list[int]
    pages: range
    numbers: Tensor
    columns: Tensor
    first: Tensor
    sequences: Tensor
    positions: Tensor
    whole: bool
    rows: Tensor
    slots: Tensor
    tokens: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        real: Tensor | None,
        count: int,
        *,
        sinks: int,
        tokens: int,
        slots: int,
        next_page: int,
        device: torch.device,
    ) -> AppendPlan:
        """Plan for sequences with ``lengths`` tokens stored that get ``count`` positions each.

        Args:
            real: ``[B, count]`` bool on the host, False at padding; None if all are real.
            tokens, slots: R, and dense slots of a sequence.
            next_page: the first page that is free; those after it are, too.
        """
        after: list[int] = []
        columns: list[int] = []
        blocks: list[Tensor] = []
        sequences: list[int] = []
        dense: list[Tensor] = []
        for row, length in enumerate(lengths):
            new = torch.arange(count) if real is None else real[row].nonzero().flatten()
            to_sinks = min(max(sinks - length, 0), len(new))
            body = new[to_sinks:]
            waiting = max(length - sinks, 0) % tokens
            complete = (waiting + len(body)) // tokens
            first = sinks + waiting if len(body) else 0
            if complete:
                source = torch.cat([sinks + torch.arange(waiting), slots + body])[: complete * tokens]
                blocks.append(source.view(complete, tokens))
                body, first = body[complete * tokens - waiting :], sinks
            had = blocks_of(length, sinks, tokens)
            columns += range(had, had + complete)
            sequences += [row] * complete
            chosen = torch.cat([new[:to_sinks], body])
            target = torch.cat([length + torch.arange(to_sinks), first + torch.arange(len(body))])
            dense.append(torch.stack([torch.full_like(chosen, row), target, chosen]))
            after.append(length + len(new))
        positions = torch.cat(blocks) if blocks else torch.empty(0, tokens, dtype=torch.long)
        whole = bool((positions[:, -1] - positions[:, 0] == tokens - 1).all() and (positions >= slots).all())
        rows, slot, token = torch.cat(dense, 1).to(device)
        places = torch.tensor(columns, dtype=torch.long, device=device)
        return cls(
            lengths=after,
            pages=range(next_page, next_page + len(columns)),
            numbers=torch.arange(next_page, next_page + len(columns), dtype=torch.int32, device=device),
            columns=places,
            first=sinks + tokens * places,
            sequences=torch.tensor(sequences, dtype=torch.long, device=device),
            positions=positions.to(device),
            whole=whole,
            rows=rows,
            slots=slot,
            tokens=token,
        )

    def source(self, dense_keys: Tensor, dense_values: Tensor, keys: Tensor, values: Tensor) -> BlockSource:
        """One layer's complete blocks, from its dense slots ``[B, Hkv, slots, D]`` and new tokens."""
        if self.whole:
            starts = (self.positions[:, 0] - dense_keys.shape[2]).int()
            everyone = torch.arange(len(keys), device=keys.device)
            return BlockSource(keys, values, self.sequences.int(), starts, everyone, self.first)
        rows = self.sequences[:, None]
        all_keys = torch.cat([dense_keys, keys.to(dense_keys.dtype)], 2)[rows, :, self.positions].transpose(1, 2)
        all_values = torch.cat([dense_values, values.to(dense_values.dtype)], 2)
        all_values = all_values[rows, :, self.positions].transpose(1, 2)
        numbers = torch.arange(len(rows), dtype=torch.int32, device=keys.device)
        return BlockSource(all_keys, all_values, numbers, torch.zeros_like(numbers), self.sequences, self.first)

    def keep(self, dense_keys: Tensor, dense_values: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the tokens that complete no block to their dense slots, once the blocks are packed."""
        dense_keys[self.rows, :, self.slots] = keys[self.rows, :, self.tokens].to(dense_keys.dtype)
        dense_values[self.rows, :, self.slots] = values[self.rows, :, self.tokens].to(dense_values.dtype)
