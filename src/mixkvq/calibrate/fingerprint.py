"""What tells data and weights from others of the same name and shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.evaluate.tasks import Task

#: Numbers of each parameter that are looked at, evenly spaced.
LOOKED_AT = 64


def of_weights(model: PreTrainedModel) -> str:
    """A digest of a model's weights: of some numbers of every parameter, rounded to bfloat16.

    By it float32 and bfloat16 copies of the same weights are the same, and fine-tuned ones are others.
    """
    looked_at = []
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        at = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), LOOKED_AT), dtype=torch.float64)
        looked_at.append(flat[at.long().to(flat.device)].to("cpu", torch.bfloat16))
    return _digest(looked_at)


def of_tokens(texts: Iterable[Tensor]) -> str:
    """A digest of what is read."""
    return _digest(texts)


def of_questions(task: Task) -> str:
    """A digest of what is asked, and what is right."""
    asked = json.dumps([[question.prompt, question.right] for question in task.questions])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
