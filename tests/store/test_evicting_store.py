"""The store that evicts: who is held, in which bytes, and that evicted bytes are given back."""

import pytest
import torch

from mixkvq.store.evicting import EvictingStore, HeldTokens

HEADS, DIM = 2, 8
TOKEN = 2 * HEADS * DIM


def store(batch: int = 1, *, mass: bool = True) -> EvictingStore:
    return EvictingStore(
        batch,
        HEADS,
        DIM,
        DIM,
        dtype=torch.float32,
        param_dtype=torch.float16,
        mass=mass,
        device=torch.device("cpu"),
    )


def filled(count: int) -> tuple[HeldTokens, torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(HEADS, count, DIM), torch.randn(HEADS, count, DIM)
    held = store().rows[0].extend(keys, values, torch.rand(count))
    return held, keys, values


def at(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_selected_tokens_are_those_asked_for():
    held, keys, values = filled(6)
    held = held.select(at(0, 2, 5))
    assert held.steps.tolist() == [0, 2, 5]
    assert (held.length, held.seen) == (3, 6)
    assert torch.equal(held.keys, keys[:, [0, 2, 5]])
    assert torch.equal(held.values, values[:, [0, 2, 5]])
    held = held.extend(keys[:, :1], values[:, :1], torch.zeros(4))
    assert held.steps.tolist() == [0, 2, 5, 6]


def test_blocks_leave_the_window_oldest_first():
    held, keys, values = filled(11)
    assert held.pack(2, 6, 4) is held  # the sinks, a window of 6, and 3 more: not yet a block
    held = held.extend(keys[:, :1], values[:, :1], torch.arange(12.0)).pack(2, 6, 4)
    assert held.packed.length == 4
    assert held.keys.shape[1] == 8
    assert held.steps.tolist() == [2, 3, 4, 5, 0, 1, *range(6, 12)]
    assert held.mass is not None
    assert held.mass.tolist() == held.steps.tolist()
    found, _ = held.dequantize()
    assert torch.equal(found[:, 4:6], keys[:, :2])
    half = keys[:, 2:6].abs().amax(1, keepdim=True) / 127 / 2
    assert bool(((found[:, :4] - keys[:, 2:6]).abs() <= 1.1 * half).all())


def test_a_prompt_leaves_in_as_many_blocks_as_are_full():
    held, _, _ = filled(30)
    held = held.pack(0, 8, 4)
    assert (held.packed.length, held.keys.shape[1]) == (20, 10)
    assert held.packed.key_scales.shape == (5, HEADS, DIM)
    assert held.packed.block.tolist() == [i // 4 for i in range(20)]


def test_evicting_packed_tokens_changes_no_others_and_takes_scales_along():
    held = filled(30)[0].pack(0, 8, 4)
    before = held.dequantize()
    index = at(1, 3, 12, 13, 20, 29)
    after = held.select(index)
    assert after.packed.block.tolist() == [0, 0, 1, 1]  # blocks 0 and 3; 1, 2 and 4 are gone
    assert after.packed.key_scales.shape[0] == 2
    for a, b in zip(after.dequantize(), before, strict=True):
        assert torch.equal(a, b[:, index])
    assert after.select(at(4, 5)).packed.key_scales.shape[0] == 0


def test_tokens_taken_back():
    held, keys, _ = filled(30)
    shorter = held.pack(0, 8, 4).without_last(12)
    assert (shorter.seen, shorter.length) == (18, 18)
    assert torch.allclose(shorter.dequantize()[0], keys[:, :18], atol=0.02)


def test_bytes_by_hand_and_given_back():
    one = store()
    one.rows[0] = filled(30)[0].pack(0, 8, 4)
    report = one.memory()
    assert report.parts == {
        "key codes": 20 * HEADS * DIM,
        "value codes": 20 * HEADS * DIM,  # a byte each
        "key scales": 5 * HEADS * DIM * 2,
        "value scales": 5 * HEADS * DIM * 2,
        "residual": 10 * TOKEN * 4,
        "statistics": 30 * 4,
        "tables": 30 * 4 + 20 * 4,
    }
    assert (report.elements, report.evicted) == (30 * TOKEN, 0)
    assert report.bits == 8 + 16 / 4
    # Whether or not anything was evicted yet. The window is in float32, and counts as if it were in 16 bits.
    assert report.size_bits == pytest.approx(8 * (report.total - 10 * TOKEN * 2) / (30 * TOKEN))
    one.rows[0] = one.rows[0].select(torch.arange(24, 30))
    report = one.memory()
    assert report.total == 6 * (TOKEN * 4 + 4 + 4)
    assert (report.elements, report.evicted) == (30 * TOKEN, 24 * TOKEN)
    assert report.bits_held == 8 * report.total / (30 * TOKEN)
    assert report.size_bits == pytest.approx(8 * (report.total - 6 * TOKEN * 2) / (30 * TOKEN))
    assert report.bf16 == 30 * TOKEN * 2
    for tensor in one.tensors():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not a view of what was evicted


@pytest.mark.parametrize("mass", [True, False])
def test_copied_sequences_share_their_bytes_until_they_part(mass: bool):
    two = store(2, mass=mass)
    keys = torch.randn(HEADS, 30, DIM)
    for row in range(2):
        two.rows[row] = two.rows[row].extend(keys, keys, torch.rand(30) if mass else None).pack(0, 8, 4)
    alone = two.memory().total
    two.select([1, 1, 1])
    assert two.lengths == [30, 30, 30]
    assert two.memory().total == alone // 2
    assert two.memory().elements == 3 * 30 * TOKEN
    two.rows[0] = two.rows[0].select(torch.arange(5, 30))
    assert two.lengths == [25, 30, 30]
    assert two.memory().total > alone // 2
