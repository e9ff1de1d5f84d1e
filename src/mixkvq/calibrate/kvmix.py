"""KVmix's profile of a model: gradients of the loss by the projections of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixkvq.adapters.transformers import NAME
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import quantized_layers
from mixkvq.calibrate.trials import Trials
from mixkvq.models import attention


def gradient_norms(
    model: PreTrainedModel, prompts: Tensor, trials: Trials, advance: Callable[[], None] = lambda: None
) -> tuple[dict[int, float], dict[int, float]]:
    """``||dLoss / dW_k||`` and ``||dLoss / dW_v||`` of every layer, mean over prompts.

    Args:
        prompts: ``[N, T]`` tokens; the loss is that of the next token, mean over a prompt.
        trials: keep what was measured on each prompt.
        advance: called after each prompt.

    Returns:
        Both by layer number.

    Raises:
        CalibrationError: keys and values have no projections of their own, or these have no gradients.
    """
    layers = quantized_layers(model)
    projections = _projections(model, layers)
    weights = [projections[layer][part] for part in (0, 1) for layer in layers]

    def measure(prompt: Tensor) -> dict[str, list[float]]:
        with attention(model, NAME), torch.enable_grad():
            logits = model(prompt[None], use_cache=False).logits[0, :-1].float()
            gradients = torch.autograd.grad(F.cross_entropy(logits, prompt[1:]), weights)
        return {"norms": torch.stack([gradient.float().norm() for gradient in gradients]).tolist()}

    norms = torch.zeros(len(weights), dtype=torch.float64)
    for at, prompt in enumerate(prompts.to(model.device)):
        kept = trials.once(f"prompt {at}", partial(measure, prompt))
        norms += torch.tensor(kept["norms"], dtype=torch.float64) / len(prompts)
        advance()
    keys, values = norms[: len(layers)].tolist(), norms[len(layers) :].tolist()
    return dict(zip(layers, keys, strict=True)), dict(zip(layers, values, strict=True))


def _projections(model: PreTrainedModel, layers: list[int]) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    found = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        parts = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
        weights = [getattr(part, "weight", None) for part in parts]
        if isinstance(layer, int) and all(isinstance(part, nn.Linear) for part in parts):
            found[layer] = tuple(weights)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise CalibrationError(
            f"KVmix ranks layers by the weights of k_proj and v_proj, and layer {missing[0]} of this "
            f"{model.config.model_type} model has no such linear layers."
        )
    if not all(
        isinstance(w, nn.Parameter) and w.is_floating_point() and w.requires_grad for ws in found.values() for w in ws
    ):
        raise CalibrationError(
            "KVmix needs gradients of the weights, and these have none: load the model in a floating-point type."
        )
    return found  # type: ignore[return-value]
