"""What a calibration is made for and on: a model, and windows of text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.calibrate import fingerprint
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.loading import inputs, load_model, parse_dtype, read_windows
from mixkvq.evaluate.fidelity import reference_log_probs
from mixkvq.models import merge_adapter


@dataclass(frozen=True)
class Subject:
    """A model, and what it is calibrated on.

    Attributes:
        model, tokenizer: as loaded, an adapter merged.
        searched: windows ``[N, W]`` to calibrate on.
        judged: others ``[M, W]``, on which it is checked what was found.
        names: of model, text and adapter, for files.
        data: what measurements depend on, whatever it is called, for trials and files.
        started: when the model was loaded, in seconds of :func:`time.monotonic`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    searched: Tensor
    judged: Tensor
    names: dict[str, Any]
    data: dict[str, Any]
    started: float

    @property
    def about(self) -> dict[str, Any]:
        """Both, for files."""
        return {**self.names, **self.data}

    def judge(self, trials: Trials) -> Judge:
        """What configurations are worth on the windows to judge on, kept in ``trials``."""
        return Judge(self.model, self.judged, trials, "held out")


def load_subject(
    model: str | None,
    dtype: str,
    device: str | None,
    text: list[Path] | None,
    window: int,
    count: int,
    *,
    in_turns: bool = True,
    adapter: Path | None = None,
) -> Subject:
    """Load a model, and cut a text for it.

    Args:
        count: windows of each text to calibrate on, and as many to judge on; fewer of a short one.
        in_turns: take every other window to judge on, so that both kinds come from all parts of a text; else the last
            ones.
        adapter: to merge into the weights.

    Raises:
        CalibrationError: there is one window alone.
    """
    network, tokenizer = load_model(model, parse_dtype(dtype), device)
    started = time.monotonic()
    texts = read_windows(tokenizer, text, window, 2 * count)
    if max(map(len, texts)) < 2:
        raise CalibrationError(
            f"No text has two windows of {window} tokens: what is found on one is checked on the other. Give a longer "
            "text, or a smaller --window."
        )
    halves = [_in_turns(each) if in_turns else each.tensor_split([(len(each) + 1) // 2]) for each in texts]
    searched, judged = (torch.cat(part) for part in zip(*halves, strict=True))
    if adapter is not None:
        network = merge_adapter(network, adapter)
    _check_numbers(network, searched[0])
    names = {**inputs(model, text), "adapter": None if adapter is None else adapter.name}
    data = {
        "dtype": dtype,
        "window": window,
        "windows": len(searched),
        "weights": fingerprint.of_weights(network),
        "tokens": fingerprint.of_tokens([searched, judged]),
    }
    return Subject(network, tokenizer, searched, judged, names, data, started)


@torch.inference_mode()
def _check_numbers(model: PreTrainedModel, tokens: Tensor) -> None:
    """Complain about a model that does not compute with numbers, as when its type has too small a range."""
    if reference_log_probs(model, tokens.to(model.device)).isnan().any():
        raise CalibrationError(
            f"In {str(model.dtype).removeprefix('torch.')} this model's logits are no numbers: choose another type "
            "with --dtype, such as bfloat16."
        )


def _in_turns(windows: Tensor) -> tuple[Tensor, ...]:
    return windows[::2], windows[1::2]
