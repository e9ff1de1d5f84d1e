"""Right chains, teacher-forced through the packed cache."""

import pytest
import torch
import torch.nn.functional as F

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.evaluate.chains import Chain
from mixkvq.evaluate.likelihood import ChainFidelity, ChainScore, chain_fidelity, pieces, score_chain
from mixkvq.evaluate.problems import Problem
from mixkvq.models import attention
from models import VOCABULARY, tiny_model


def random_chain(prompt: int, length: int, name: str = "a") -> Chain:
    return Chain(Problem(name, "family", "", ""), torch.randint(3, VOCABULARY, (prompt + length,)), prompt)


def test_pieces_end_where_blocks_do():
    config = MixKVQConfig.preset("default")  # 4 sinks, blocks of 128
    assert pieces(50, 300, config) == [(0, 50), (50, 132), (132, 260), (260, 300)]
    assert pieces(200, 300, config) == [(0, 200), (200, 260), (260, 300)]
    assert pieces(260, 300, config) == [(0, 260), (260, 300)]
    assert pieces(40, 40, config) == [(0, 40)]


@pytest.mark.parametrize("prompt", [20, 150])
def test_a_cache_that_takes_nothing_away_scores_as_one_forward_pass(prompt: int):
    model, chain = tiny_model("llama"), random_chain(prompt, 200)
    with torch.inference_mode(), attention(model, "eager"):
        logits = model(chain.tokens[None]).logits[0, prompt - 1 : -1]
    targets = chain.tokens[prompt:]
    with attention(model, "mixkvq"):
        score, held = score_chain(model, chain, MixKVQConfig.preset("bf16"))
    assert score.tokens == 200
    assert score.nats == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)
    assert score.wrong == int((logits.argmax(-1) != targets).sum())
    assert held.bits == 32


def test_it_is_the_likelihood_of_decoding_token_by_token():
    model, chain, config = tiny_model("llama"), random_chain(70, 150), MixKVQConfig.preset("kivi-2")
    with torch.inference_mode(), attention(model, "mixkvq"):
        score, _ = score_chain(model, chain, config)
        cache = MixKVQCache(model.config, config)
        logits = [model(chain.tokens[None, :70], past_key_values=cache).logits[0, -1]]
        logits += [model(chain.tokens[None, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(70, 219)]
    expected = F.cross_entropy(torch.stack(logits), chain.tokens[70:], reduction="sum").item()
    assert score.nats == pytest.approx(expected, rel=1e-3)


def test_rows_sum_up_their_chains():
    scores = [
        ChainScore(str(n), "f", n, nats, wrong) for n, nats, wrong in ((100, 1.0, 0), (200, 3.0, 2), (900, 8.0, 1))
    ]
    row = ChainFidelity.of("k", 2.5, scores)
    assert (row.nats_per_chain, row.nats_per_token, row.exact) == (4.0, 0.01, pytest.approx(1 / 3))
    assert row.by_length == (2.0, None, 8.0)


def test_rows_rise_by_honest_bits():
    caches = {name: MixKVQConfig.preset(name) for name in ("bf16", "kivi-4", "kivi-2")}
    read: list[str] = []
    rows = chain_fidelity(tiny_model("llama"), [random_chain(200, 100), random_chain(20, 200)], caches, read.append)
    assert [row.cache for row in rows] == ["kivi-2", "kivi-4", "bf16"]
    assert [score.tokens for score in rows[0].scores] == [100, 200]
    assert sorted(read) == sorted([*caches, *caches])
    assert rows[0].as_dict()["scores"][0]["name"] == "a"
