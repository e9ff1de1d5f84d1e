"""Queries, keys and values of a full-precision pass, with the gradients that say how much keys and values matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixkvq.adapters.transformers.attention import attention_forward, logit_scaling
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.calibrate.observe import observed
from mixkvq.kernels.partial import causal


@dataclass(frozen=True)
class Tape:
    """What several layers of the same shape did over one text of T tokens.

    Attributes:
        layers: their numbers in the model.
        query: ``[layers, Hq, T, D]`` after RoPE.
        keys, values: ``[layers, Hkv, T, D]``, as a cache gets them.
        key_gradients, value_gradients: ``[samples, layers, Hkv, T, D]`` float32, of the loss of the labels, summed over
            the scored tokens.
        scored: how many tokens these were.
        attention: by layer, what :func:`mixkvq.kernels.reference.attention` takes besides these tensors to attend as
            the model does: scaling, soft cap and sinks.
    """

    layers: tuple[int, ...]
    query: Tensor
    keys: Tensor
    values: Tensor
    key_gradients: Tensor
    value_gradients: Tensor
    scored: int
    attention: tuple[dict[str, Any], ...]


def record(
    model: PreTrainedModel,
    tokens: Tensor,
    first: int,
    bounds: Sequence[tuple[int, int]],
    generator: torch.Generator | None,
    samples: int = 2,
) -> list[Tape]:
    """One pass over ``tokens [T]``, scored from position ``first`` on; a tape for every shape of layers.

    Labels are sampled from the model, as often as ``samples`` says; without a ``generator`` they are the text's own
    next tokens, once.

    A query sees its own block in full precision, so that gradients are of what queries of later blocks (``bounds``)
    read. The square of such a gradient times a small change is, on average over labels, twice the KL that the change
    costs, if labels are sampled: they are scores of the model's own distribution, whose covariance is the Fisher
    information.

    Raises:
        CalibrationError: the model has no gradients.
    """
    recording = _Recording(bounds, quantized_layers(model))
    with observed(model, recording), torch.enable_grad():
        logits = model(tokens[None], use_cache=False).logits[0, first:].float()
        steps = recording.steps
        inputs = [tensor for step in steps.values() for tensor in step.changes]
        if generator is None:
            logits, labels = logits[:-1], tokens[first + 1 :, None]
        else:
            labels = logits.detach().softmax(-1).multinomial(samples, replacement=True, generator=generator)
        losses = [nn.functional.cross_entropy(logits, each, reduction="sum") for each in labels.T]
        try:
            gradients = [
                torch.autograd.grad(loss, inputs, retain_graph=i + 1 < len(losses)) for i, loss in enumerate(losses)
            ]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CalibrationError(
                "This calibration needs gradients, and none come through the model (weights left quantized?): "
                f"{error}. Load it in a floating-point type."
            ) from error
    by_shape: dict[tuple[torch.Size, ...], list[int]] = {}
    for at, step in enumerate(steps.values()):
        by_shape.setdefault(tuple(tensor.shape for tensor in step.tensors), []).append(at)
    numbers, taken = list(steps), list(steps.values())

    def stack(at: Sequence[int], part: int) -> Tensor:
        return torch.cat([taken[i].tensors[part].detach() for i in at])

    def gradient(at: Sequence[int], part: int) -> Tensor:
        return torch.stack([torch.cat([sample[2 * i + part].float() for i in at]) for sample in gradients])

    return [
        Tape(
            layers=tuple(numbers[i] for i in at),
            query=stack(at, 0),
            keys=stack(at, 1),
            values=stack(at, 2),
            key_gradients=gradient(at, 0),
            value_gradients=gradient(at, 1),
            scored=len(logits),
            attention=tuple(taken[i].attention for i in at),
        )
        for at in by_shape.values()
    ]


@dataclass(frozen=True)
class _Step:
    """A layer's query, keys and values, zeros that were added to keys and values where later blocks read them, and
    :attr:`Tape.attention`.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    changes: tuple[Tensor, Tensor]
    attention: dict[str, Any]


class _Recording:
    """An :class:`~mixkvq.calibrate.observe.Observer` that keeps what layers attended with."""

    def __init__(self, bounds: Sequence[tuple[int, int]], layers: Sequence[int]) -> None:
        self.bounds, self.layers = bounds, layers
        self.steps: dict[int, _Step] = {}

    def attend(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Attention block by block."""
        changes = torch.zeros_like(key, requires_grad=True), torch.zeros_like(value, requires_grad=True)
        self.steps[layer] = _Step((query, key, value), changes, _attention(query, **options))
        stored = key + changes[0], value + changes[1]
        outputs = []
        for start, stop in self.bounds:
            keys, values = (
                torch.cat([past[:, :, :start], own[:, :, start:stop]], 2)
                for past, own in zip(stored, (key, value), strict=True)
            )
            keys._mixkvq = True  # type: ignore[attr-defined]  # no stock cache: see `attention.py`
            mask = causal(stop - start, stop, query.device)[None, None]
            outputs.append(attention_forward(module, query[:, :, start:stop], keys, values, mask, **options)[0])
        return torch.cat(outputs, 1)


def _attention(
    query: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> dict[str, Any]:
    """One layer's :attr:`Tape.attention`, from the options of :func:`attention_forward`."""
    sinks = None if s_aux is None else s_aux.detach()
    return {"scaling": logit_scaling(query, scaling), "softcap": softcap, "sinks": sinks}
