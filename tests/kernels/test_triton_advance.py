"""The books that kernels keep are those of the store."""

import copy

import pytest
import torch

from kernels.helpers import current_devices
from mixkvq import MixKVQConfig
from mixkvq.kernels.triton import advance as module
from mixkvq.kernels.triton.advance import advance, hand_out_chunks
from mixkvq.layers.recipe import LayerShape, Recipe
from mixkvq.policies import policy_class
from mixkvq.store.shape import StaticShape
from mixkvq.store.static import StaticStore

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_store(text: str, batch: int, pages: int, room: dict[int, int] | None = None) -> StaticStore:
    config = MixKVQConfig.parse(text)
    recipe = Recipe.of(config, policy_class(config.policy)(config), LayerShape(2, 16, 16, torch.float32))
    shape = StaticShape(
        layout=recipe.layout,
        layers=3,
        batch=batch,
        sinks=config.sinks,
        rotated=recipe.rotated,
        chunks_per_page=recipe.chunks_per_page,
        statistics=False,
    )
    return StaticStore(shape, pages, room or shape.chunk_room(pages, {4: 0.2, 16: 0.1}), DEVICE)


@pytest.mark.parametrize("text", ["default:residual_length=32,key_group=32", "kivi-2:residual_length=16,key_group=16"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_steps_of_any_size_until_pages_run_out(text: str, batch: int):
    store = new_store(text, batch, pages=batch + 3)
    store.books.lengths += torch.randint(0, 20, (batch,), device=DEVICE).int()
    twin = copy.deepcopy(store)
    for count in (1, 8, 3, 7, 1, 2, 8, 8, 5) * 4:
        store.advance(count)
        advance(twin, count)
        for ours, theirs in zip(store._tables(), twin._tables(), strict=True):
            assert torch.equal(ours, theirs)
    assert int(store.books.overflow) == 1
    assert int(store.books.next_page) == batch + 3


def test_chunks_are_handed_out_until_they_run_out():
    store = new_store("paper", batch=4, pages=9, room={4: 10, 16: 7})
    store.active.copy_(torch.arange(12) % 3 > 0)
    bits = torch.full((12, 2, 16), 2, dtype=torch.uint8, device=DEVICE)
    bits[:, 0, :9] = 4
    bits[:, 1, :11] = 4
    bits[:, 1, 3] = 16
    planned = bits.clone()
    hand_out_chunks(store, bits)
    active = store.active.bool()
    assert torch.equal(bits[~active], planned[~active])
    assert store.homeless.item() == 3 + 1
    for width, chunks, served in ((4, 2, 5), (16, 1, 7)):
        whole = ((bits == width).sum((1, 2)) == (planned == width).sum((1, 2))) & active
        assert whole.sum() == served
        starts = store.run_starts[width][whole].sort().values
        assert torch.equal(starts, torch.arange(served, device=DEVICE, dtype=torch.int32) * chunks)
    assert ((bits == planned) | (bits == 2)).all()


def test_they_are_launched_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch):
    store = new_store("paper", batch=4, pages=9, room={4: 10, 16: 7})
    bits = torch.full((12, 2, 16), 2, dtype=torch.uint8, device=DEVICE)
    where = store.pages.device
    assert current_devices(monkeypatch, module, "_advance", lambda: advance(store, 1)) == [where]
    assert current_devices(monkeypatch, module, "_hand_out", lambda: hand_out_chunks(store, bits)) == [where, where]
