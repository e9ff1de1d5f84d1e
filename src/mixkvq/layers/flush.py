"""How blocks get into a statically shaped cache: in torch operations, or by kernels that never ask the host."""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.kernels.decode import decode_attention, has_kernels
from mixkvq.layers.recipe import MAX_QUANTIZED, Recipe
from mixkvq.layers.step import Step
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store.appending import BlockSource
from mixkvq.store.packing import write_blocks
from mixkvq.store.static import StaticStore


def flush_step(store: StaticStore, recipe: Recipe, count: int) -> None:
    """Take ``count`` new tokens of every sequence, which lie in the residuals, into the books, and pack what is full.

    All layers at once. With kernels it does not wait for the device.
    """
    if has_kernels(store.pages.device):
        from mixkvq.kernels.triton.advance import advance

        advance(store, count)
        _pack_active(store, recipe)
    else:
        store.advance(count)
        full = store.active.nonzero().flatten()
        if len(full):
            first = store.first_tokens()[full]
            source = BlockSource(*store.all_dense, full.int(), store.starts[full], store.rows.long(), first)
            pack(store, recipe, source, store.all_statistics, store.numbers[full])
    if count > 1:
        store.shift()


def _pack_active(store: StaticStore, recipe: Recipe) -> None:
    """Pack the residuals that ``store.active`` marks, by kernels."""
    from mixkvq.kernels.triton.advance import hand_out_chunks

    keys, values = store.all_dense
    where = store.rows, store.starts
    bits = recipe.plan_on_device(keys, *where, store.active, store.all_statistics)
    if store.shape.chunks_per_page is None:
        hand_out_chunks(store, bits)
    keys = recipe.move_on_device(keys, *where, store.active, bits, store.all_statistics, in_place=True)  # done with
    pools = store.all_pages, store.chunks
    recipe.pack_on_device(keys, values, *where, bits, store.numbers, store.run_starts, *pools)


def rehearse(store: StaticStore, recipe: Recipe, step: Step) -> None:
    """Run a decode step of a token like ``step``'s that changes nothing.

    It loads the kernels, and makes the tensors that they keep between launches: made under capture, these would lie in
    the memory of one CUDA graph.
    """
    if not has_kernels(store.pages.device):
        return
    token = step.tokens(0, 1)
    decode_attention(token.query, token.keys, token.values, store.tensors(0), scaling=1.0)
    store.numbers.fill_(-1)
    store.active.zero_()
    _pack_active(store, recipe)


def pack(
    store: StaticStore,
    recipe: Recipe,
    source: BlockSource,
    statistics: QueryStatistics | None,
    numbers: Tensor,
) -> None:
    """Plan, quantize and pack N blocks into records ``numbers [N]`` of the pages of all layers.

    May wait for the device.

    Args:
        statistics: query statistics of the sequences that ``source`` names, or None.
    """
    if recipe.packs_on(numbers.device):
        of_rows = None if statistics is None else statistics.rows(source.sequences)
        where = source.rows, source.starts
        everyone = torch.ones_like(numbers)
        bits = recipe.plan_on_device(source.keys, *where, everyone, of_rows)
        bits, run_starts = store.house(bits, numbers)
        keys = recipe.move_on_device(source.keys, *where, everyone, bits, of_rows)
        pools = store.all_pages, store.chunks
        recipe.pack_on_device(keys, source.values, *where, bits, numbers, run_starts, *pools)
        return
    size = max(1, MAX_QUANTIZED // (source.keys[0, :, 0].numel() * store.layout.tokens))
    for part, keys, values in source.blocks(store.layout.tokens, size):
        of_blocks = None
        if statistics is not None:
            of_blocks = statistics.rows(source.sequences[source.rows[part].long()])
        bits, run_starts = store.house(recipe.plan(keys, of_blocks), numbers[part])
        blocks = recipe.quantize(keys, values, bits, of_blocks, source.first[part])
        write_blocks(store.layout, store.all_pages, store.chunks, *blocks, numbers[part], run_starts)
