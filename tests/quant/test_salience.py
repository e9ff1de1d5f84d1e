"""Importance, sensitivity: worked by hand."""

import torch

from mixkvq.quant.salience import QueryStatistics, sensitivity


def test_sensitivity_is_the_mean_step_over_groups():
    keys = torch.zeros(1, 1, 4, 1)
    keys[0, 0, :, 0] = torch.tensor([0.0, 3.0, 10.0, 4.0])
    # groups of two: ranges 3 and 6, steps at 2 bits 1 and 2
    assert sensitivity(keys, group=2, bits=2).item() == 1.5
    assert torch.isclose(sensitivity(keys, group=4, bits=2), torch.tensor(10 / 3)).item()


def test_importance_runs_over_the_heads_of_a_group():
    statistics = QueryStatistics(1, kv_heads=1, head_dim=2, device=torch.device("cpu"))
    query = torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]])  # [1, 2 heads, 1 token, 2]
    statistics.update(query)
    assert statistics.importance().tolist() == [[[2.0, 1.0]]]
    statistics.update(torch.zeros(1, 2, 1, 2))
    assert statistics.importance().tolist() == [[[1.0, 0.5]]]


def test_padding_queries_do_not_count_whatever_they_hold():
    query = torch.randn(2, 4, 6, 8)
    real = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    query[1, :, 0] = float("nan")
    padded = QueryStatistics(2, 2, 8, torch.device("cpu"))
    padded.update(query, real)
    alone = QueryStatistics(1, 2, 8, torch.device("cpu"))
    alone.update(query[1:, :, 2:])
    assert torch.allclose(padded.importance()[1], alone.importance()[0])


def test_updates_one_by_one_equal_one_update():
    query = torch.randn(2, 4, 5, 8)
    together, apart = (QueryStatistics(2, 2, 8, torch.device("cpu")) for _ in range(2))
    together.update(query)
    for token in range(5):
        apart.update(query[:, :, token : token + 1])
    assert torch.allclose(together.importance(), apart.importance())


def test_nothing_seen_yet_counts_as_equal_use():
    statistics = QueryStatistics(1, 1, 3, torch.device("cpu"))
    assert statistics.importance().tolist() == [[[1.0, 1.0, 1.0]]]
