"""What commands read: a model, an adapter for it, and windows of text."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.adapters.transformers.support import model_shape
from mixkvq.calibrate.file import read_about
from mixkvq.calibrate.fingerprint import of_weights
from mixkvq.cli.common import InputError, say, warn
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.fidelity import WARM_UP
from mixkvq.evaluate.texts import BUILT_IN, windows
from mixkvq.models import DEFAULT_MODEL, check_adapter, load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


#: The adapter that comes with a checkout of the project, and is not installed.
REASONER = Path(__file__).parents[3] / "recipes" / "reasoner" / "adapter"


def parse_dtype(name: str) -> torch.dtype:
    """A type by name, or an error that lists them."""
    if name not in DTYPES:
        raise InputError(f"There is no type '{name}'. Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_model(
    name: str | None, dtype: torch.dtype, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model while a spinner says so."""
    transformers.utils.logging.set_verbosity_error()
    if name is not None:  # the hub's own progress bars
        say(f"Loading {name} …")
        return load(name, dtype=dtype, device=device)
    # The spinner keeps the real standard error; what libraries write there while loading would tear it apart.
    spinner = Console(file=sys.stderr)
    with spinner.status(f"Loading {DEFAULT_MODEL} …"), contextlib.redirect_stderr(io.StringIO()):
        return load(name, dtype=dtype, device=device)


def warn_of_other_weights(model: PreTrainedModel, caches: Mapping[str, MixKVQConfig]) -> None:
    """Say which calibrations were made on other weights of a model's shape; those of other shapes are refused later.

    Args:
        caches: as :func:`parse_caches` returns them.
    """
    shape, own = model_shape(model.config), None
    strange = []
    for name, config in caches.items():
        about = read_about(name) if config.model == shape else {}
        if about.get("weights") is None:
            continue
        types = {DTYPES.get(about.get("dtype", "")), model.dtype}
        if torch.float16 in types and len(types) > 1:
            continue  # it does not round as bfloat16 does, by which weights are compared
        own = own or of_weights(model)
        if about["weights"] != own:
            strange.append(name)
    if strange:
        warn(
            f"calibrated on other weights of this shape: {', '.join(strange)}. Bits may lie where this model does not "
            "need them; `mixkvq fidelity` measures what that costs."
        )


def check_reasoner(count: int, use: str) -> None:
    """Complain about fewer chains than none; ``use`` is what is done with them."""
    if count < 0:
        raise InputError(f"--reasoner {count}: {use} the chains of at least one problem, or of none.")


def reasoner_adapter(given: Path | None, model: str | None) -> Path | None:
    """The adapter to merge: the one given, the recipe's for the default model, none for another model."""
    if given is None and model is not None:
        return None
    if given is None and not REASONER.exists():
        raise InputError(
            "The default model does not solve these problems without an adapter, and recipes/reasoner/adapter is only "
            "in a checkout of the project. Give a folder with --adapter (recipes/reasoner/train.py makes one), or "
            "another model with --model."
        )
    folder = given or REASONER
    check_adapter(folder)
    return folder


def check_windows(window: int, count: int, base: MixKVQConfig | None = None) -> None:
    """Complain about windows of which too little is scored, or none.

    Args:
        base: a cache that is to read something packed in them.
    """
    packed = 0 if base is None else base.sinks + base.residual_length + 1
    least = max(2 * WARM_UP, packed)
    why = f"the first {WARM_UP} are not scored" if least > packed else "sinks and a block, and a token that reads it"
    if window < least or count < 1:
        raise InputError(
            f"--window {window} --windows {count}: take windows of at least {least} tokens ({why}), and at least one."
        )


def read_windows(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[Path] | None, window: int, count: int
) -> list[Tensor]:
    """Windows ``[N, window]`` of each text, ``count`` or, with a note, as many as a shorter one has."""
    found = []
    for path in text or (None,):
        found.append(windows(tokenizer, [path], window, count))
        if len(found[-1]) < count:
            have = f"{len(found[-1])} windows" if len(found[-1]) > 1 else "one window"
            say(f"'{path or BUILT_IN}' has {have} of {window} tokens, of {count} that were asked for.")
    return found


def inputs(model: str | None, text: Sequence[Path] | None) -> dict[str, Any]:
    """What was read, for results: the model's name and the texts' file names."""
    return {"model": model or DEFAULT_MODEL, "text": [path.name for path in text] if text else [BUILT_IN]}
