"""Importance, sensitivity: worked by hand."""

import pytest
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


def sampled(batch: int, kv_heads: int, dim: int) -> QueryStatistics:
    return QueryStatistics(batch, kv_heads, dim, torch.device("cpu"), sample_dtype=torch.float32)


def test_every_fourth_query_of_the_heads_in_turn_is_kept_in_a_ring():
    # The query of token p and head h is 1000 h + p + 1; one KV head, two query heads.
    query = (torch.arange(521.0)[None, :, None] + 1000 * torch.arange(2.0)[:, None, None] + 1)[None]
    statistics = sampled(1, 1, 1)
    statistics.sample(query[:, :, :9], torch.tensor([0]))  # tokens 0 to 8: of 0, 4, 8
    assert statistics.samples[0, 0, :4, 0].tolist() == [1, 1005, 9, 0]
    statistics.sample(query[:, :, 9:], torch.tensor([9]))  # to token 520: 512 takes the place of 0
    assert statistics.samples[0, 0, :4, 0].tolist() == [513, 1517, 521, 1013]
    assert statistics.samples[0, 0, 127, 0] == 1509


def test_samples_do_not_depend_on_how_tokens_come():
    query, lengths = torch.randn(2, 6, 900, 8), torch.tensor([0, 7])
    together, apart = sampled(2, 2, 8), sampled(2, 2, 8)
    together.sample(query, lengths)
    done = 0
    for count in (130, 1, 3, 1, 1, 7, 150, 2, 605):
        apart.sample(query[:, :, done : done + count], lengths + done)
        done += count
    assert done == 900
    assert torch.equal(together.samples, apart.samples)


@pytest.mark.parametrize("pad", [[0, 1, 2, 3], [150, 151], [5, 40, 41]])
def test_padding_is_not_sampled_whatever_it_holds(pad: list[int]):
    query, real = torch.randn(1, 4, 152, 8), torch.ones(1, 152, dtype=torch.bool)
    query[:, :, pad], real[:, pad] = float("nan"), False
    padded, alone = sampled(1, 2, 8), sampled(1, 2, 8)
    padded.sample(query, torch.tensor([3]), real)
    alone.sample(query[:, :, real[0]], torch.tensor([3]))
    assert torch.equal(padded.samples, alone.samples)
    assert padded.with_prompt(query, real).covariance().isfinite().all()


def test_a_prompt_is_sampled_all_over():
    statistics = sampled(1, 1, 4)
    early = torch.zeros(1, 1, 8000, 4)
    early[:, :, :4000, 1] = 1
    statistics.sample(early, torch.tensor([0]))
    assert statistics.covariance()[0, 0, 1, 1] == 0
    assert statistics.with_prompt(early).covariance()[0, 0, 1, 1] == 250  # of 500 samples of the prompt
    assert statistics.with_prompt(early[:, :, :100]) is statistics


@pytest.mark.parametrize(("count", "padding"), [(600, 601), (2600, 37), (400, 300)])
def test_samples_of_a_prompt_do_not_depend_on_padding(count: int, padding: int):
    query = torch.randn(1, 4, count + padding, 8)
    real = torch.arange(count + padding)[None] >= padding
    padded, alone = sampled(1, 2, 8), sampled(1, 2, 8)
    padded.sample(query, torch.tensor([0]), real)
    alone.sample(query[:, :, padding:], torch.tensor([0]))
    ours, theirs = padded.with_prompt(query, real), alone.with_prompt(query[:, :, padding:])
    torch.testing.assert_close(ours.covariance(), theirs.covariance())
