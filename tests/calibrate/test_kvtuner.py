"""KVTuner's search space: Pareto sets and clusters by hand, errors against the model's own with a quantized cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.kvtuner import (
    Cluster,
    PairErrors,
    check_floor,
    cluster_layers,
    first_choices,
    layer_fields,
    output_errors,
)
from mixkvq.evaluate.fidelity import appends, fidelity
from mixkvq.models import attention
from mixkvq.policies.kvtuner import PAIRS, pair_fields
from models import VOCABULARY, tiny_model

BITS = (9.0, 7.0, 5.0, 4.0, 3.0)
BASE = MixKVQConfig.preset("kvtuner", residual_length=32)
EXACT = {"policy": "bf16", "key_bits": 16, "value_bits": 16}


def costs(*errors: float) -> PairErrors:
    return PairErrors(errors, BITS)


def test_pairs_that_another_beats_are_not_offered():
    assert PAIRS == ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
    assert costs(0.1, 0.2, 0.3, 0.4, 0.5).pareto == (0, 1, 2, 3, 4)
    # 4/2 has a larger error than 2/2, and 4/4 the same, and both take more bits.
    assert costs(0.1, 0.2, 0.3, 0.35, 0.3).pareto == (0, 1, 4)


def test_clusters_by_hand():
    found = cluster_layers(
        {
            0: costs(0.01, 0.02, 0.03, 0.04, 0.05),
            1: costs(0.04, 0.08, 0.12, 0.16, 0.20),  # four times layer 0
            2: costs(0.01, 0.02, 0.03, 0.04, 0.09),  # 1.8 times in the last pair
            3: costs(0.01, 0.02, 0.03, 0.06, 0.05),  # like layer 0, but 4/2 is beaten by 2/2
            5: costs(0.06, 0.12, 0.18, 0.24, 0.30),  # 1.5 times layer 1
        },
        similar=2,
    )
    every = (0, 1, 2, 3, 4)
    assert found == [Cluster((0, 2), every), Cluster((1, 5), every), Cluster((3,), (0, 1, 2, 4))]
    alike = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (4, 4, 4)]
    assert first_choices(found, BITS, 5.5) == [*alike, (1, 2, 2), (2, 1, 2), (2, 2, 1)]
    assert first_choices(found, BITS, 4.5) == [*alike, (3, 3, 2)]  # the last cluster cannot have 4/2
    assert first_choices(found, BITS, 99) == alike
    fields = layer_fields(found, [1, 4, 2])
    assert fields[0] == fields[2] == {"key_bits": 8, "value_bits": 4}
    assert fields[1] == fields[5] == {"key_bits": 2, "value_bits": 2}
    assert fields[3] == {"key_bits": 4, "value_bits": 4}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(1e-4, 1), min_size=5, max_size=5), min_size=1, max_size=12),
    st.floats(1.1, 4),
)
def test_layers_of_a_cluster_are_similar(errors: list[list[float]], similar: float):
    given_costs = {layer: costs(*each) for layer, each in enumerate(errors)}
    clusters = cluster_layers(given_costs, similar)
    assert sorted(layer for cluster in clusters for layer in cluster.layers) == list(given_costs)
    for cluster in clusters:
        assert {given_costs[layer].pareto for layer in cluster.layers} == {cluster.pairs}
        for pair in cluster.pairs:
            own = [given_costs[layer].errors[pair] for layer in cluster.layers]
            assert max(own) <= similar * min(own) * (1 + 1e-6)


def test_a_goal_below_the_smallest_pairs():
    check_floor({0: costs(1, 2, 3, 4, 5)}, 3.0)
    with pytest.raises(CalibrationError, match=r"2.9 bits are below the floor of 3: 2 bits for all keys and 2 for all"):
        check_floor({0: costs(1, 2, 3, 4, 5)}, 2.9)


@pytest.mark.parametrize(("architecture", "quantized"), [("llama", [0, 1]), ("gemma2", [1])])
def test_errors_are_those_of_the_cache_in_use(architecture: str, quantized: list[int]):
    """One layer quantized and all others exact, block by block: what comes out of its attention."""
    model, tokens = tiny_model(architecture), torch.randint(3, VOCABULARY, (100,))
    found = output_errors(model, tokens[None], BASE)
    assert list(found) == quantized
    at = PAIRS.index((4, 2))
    for layer in quantized:
        fields = [pair_fields(PAIRS[at]) if i == layer else EXACT for i in range(2)]
        exact, cached = (
            attention_outputs(model, tokens, BASE.replace(layers=own), layer) for own in ([EXACT, EXACT], fields)
        )
        wanted = ((cached - exact).norm(dim=-1) / exact.norm(dim=-1))[32:].mean()
        assert found[layer].errors[at] == pytest.approx(float(wanted), rel=1e-3)


def attention_outputs(model, tokens: torch.Tensor, config: MixKVQConfig, layer: int) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
        lambda _, inputs: outputs.append(inputs[0][0])
    )
    cache = MixKVQCache(model.config, config)
    with attention(model, "mixkvq"), torch.inference_mode():
        for start, stop in appends(len(tokens), config):
            model(tokens[None, start:stop], past_key_values=cache)
    hook.remove()
    return torch.cat(outputs)


def test_fewer_bits_cost_more_and_are_honest():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 200))
    found = output_errors(model, texts, BASE)
    for each in found.values():
        assert each.errors[0] < each.errors[2] < each.errors[4]
    row = fidelity(model, texts, {"uniform": BASE.replace(**pair_fields(PAIRS[3]))})[0]
    assert [each.bits[3] for each in found.values()] == pytest.approx([row.bits] * 2)


def test_windows_of_one_block_tell_nothing():
    with pytest.raises(
        CalibrationError, match=r"Windows of 32 tokens hold one block of 32, which no later token reads"
    ):
        output_errors(tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 32)), BASE)


def test_the_preset_has_the_bits_of_kivi_4():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 300))
    rows = fidelity(model, texts, {name: MixKVQConfig.preset(name) for name in ("kivi-4", "kvtuner")})
    assert rows[0].kl == rows[1].kl
    assert rows[0].bits == rows[1].bits
