"""The BF16 kernels that ours are compared with compute attention."""

import pytest
import torch

from mixkvq.bench.baseline import SplitConfig, sdpa_contenders, split_kv_attention, tuned
from mixkvq.bench.timing import Timer, relative_error
from mixkvq.kernels.reference import attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(batch: int, heads: int, kv_heads: int, dim: int, capacity: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = (batch, heads, 1, dim), (batch, kv_heads, capacity, dim), (batch, kv_heads, capacity, dim)
    return [torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes]


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    rows = []
    for row, length in enumerate(lengths):
        visible = torch.ones(1, length, dtype=torch.bool, device=query.device)
        rows.append(attention(query[row], keys[row, :, :length], values[row, :, :length], visible, scaling=0.3))
    return torch.stack(rows)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("config", [SplitConfig(32, 4, 2, 100), SplitConfig(64, 4, 3, 1)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 3, 24), (5, 1, 64), (34, 2, 16)])
def test_split_kv_reads_what_is_filled(heads, kv_heads, dim, config, dtype, error):
    query, keys, values = inputs(2, heads, kv_heads, dim, 300, dtype)
    lengths = [201, 1]
    keys[1, :, 1:], values[1, :, 1:] = float("nan"), float("nan")
    output = split_kv_attention(query, keys, values, torch.tensor(lengths, device=DEVICE), scaling=0.3, config=config)
    assert output.dtype == dtype
    assert relative_error(output, expected(query, keys, values, lengths)) < error


def test_split_kv_takes_strided_caches():
    query, keys, values = inputs(2, 4, 2, 16, 128, torch.float32)
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    lengths = torch.tensor([128, 77], device=DEVICE)
    output = split_kv_attention(query, keys, values, lengths, scaling=0.3, config=SplitConfig(32, 4, 2, 4))
    assert relative_error(output, expected(query, keys, values, [128, 77])) < 1e-5


def test_sdpa_contenders_are_attention():
    query, keys, values = inputs(2, 8, 2, 64, 256, torch.bfloat16)
    contenders = sdpa_contenders(query, keys, values, 0.3)
    assert contenders
    for call in contenders.values():
        assert relative_error(call(), expected(query, keys, values, [256, 256])) < 2e-2


def test_tuning_chooses_one(monkeypatch: pytest.MonkeyPatch):
    configs = SplitConfig(32, 4, 2, 1), SplitConfig(64, 4, 2, 1)
    monkeypatch.setattr("mixkvq.bench.baseline.SPLIT_CONFIGS", configs)
    query, keys, values = inputs(1, 2, 1, 16, 64, torch.float32)
    lengths = torch.tensor([64], device=DEVICE)
    assert tuned(query, keys, values, lengths, scaling=0.3, timer=Timer(DEVICE, 1 << 12), repeats=1) in configs


def test_an_error_that_is_no_number_is_infinite():
    right = torch.ones(2, 3)
    assert relative_error(right, right) == 0
    assert relative_error(right.clone().fill_(float("nan")), right) == float("inf")
    assert relative_error(torch.tensor([[1.0, 1, 1], [2, 2, 2]]), right) == pytest.approx(1)
