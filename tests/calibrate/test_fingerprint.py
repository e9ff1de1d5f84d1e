"""Fingerprints: the same for the same weights and data, others for others."""

import copy

import torch

from mixkvq.calibrate import fingerprint
from models import tiny_model


def test_weights_are_told_from_others_of_their_shape():
    model = tiny_model("llama")
    own = fingerprint.of_weights(model)
    assert fingerprint.of_weights(copy.deepcopy(model)) == own
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight += 0.01
    assert fingerprint.of_weights(other) != own


def test_weights_are_the_same_in_bfloat16():
    model = copy.deepcopy(tiny_model("llama"))
    own = fingerprint.of_weights(model)
    assert fingerprint.of_weights(model.to(torch.bfloat16)) == own


def test_texts_are_told_apart():
    tokens = torch.arange(10)
    own = fingerprint.of_tokens([tokens])
    assert fingerprint.of_tokens([tokens.clone()]) == own
    assert fingerprint.of_tokens([tokens.flip(0)]) != own
    assert fingerprint.of_tokens([tokens[:5], tokens[5:]]) != own
