"""``mixkvq fidelity``: what a cache costs in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from mixkvq.adapters.transformers.support import model_shape
from mixkvq.bench.environment import environment
from mixkvq.calibrate.file import shipped
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    InputError,
    JsonOption,
    ModelOption,
    ReasonerOption,
    TextOption,
    WindowsOption,
    clean_exit,
    parse_caches,
    print_table,
    progress,
)
from mixkvq.cli.files import check_files, write_json
from mixkvq.cli.loading import (
    check_reasoner,
    check_windows,
    inputs,
    load_model,
    parse_dtype,
    read_windows,
    reasoner_adapter,
    warn_of_other_weights,
)
from mixkvq.config import MixKVQConfig, all_presets
from mixkvq.evaluate import fidelity as measure
from mixkvq.evaluate.chains import Chain, encode
from mixkvq.evaluate.likelihood import chain_fidelity
from mixkvq.evaluate.problems import problem_set
from mixkvq.models import context_length, merge_adapter
from mixkvq.policies.mixkvq import PAPER_THRESHOLDS
from mixkvq.report.tables import chain_table, fidelity_table

CACHES = ["kivi-2", "paper", "default", "kivi-4"]
#: Presets that say something about another model alone, and full precision.
ELSEWHERE = {"bf16", *(f"paper-{model}" for model in PAPER_THRESHOLDS)}
#: Problems that recipes are compared on; accuracy is measured on others.
SPLIT = "dev"


class Suite(StrEnum):
    """Sets of caches."""

    ALL = "all"


def fidelity(
    cache: Annotated[list[str] | None, typer.Option(help=CacheHelp, show_default=" ".join(CACHES))] = None,
    suite: Annotated[
        Suite | None, typer.Option(help="Also every preset, and the package's calibrations that are for the model.")
    ] = None,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens that are read from an empty cache.")] = 2048,
    count: WindowsOption = 4,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="The model's type; float32 keeps its own rounding out.")] = "float32",
    reasoner: Annotated[
        int, typer.Option(help="Also score the right chains of so many problems, by a model that can solve them.")
    ] = 0,
    adapter: ReasonerOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Compare caches with full precision on text: perplexity, KL, top-1 agreement, bits, bytes."""
    with clean_exit():
        check_files([json_file], text)
        configs = parse_caches(cache or ([] if suite else CACHES))
        check_reasoner(reasoner, "score")
        merged = reasoner_adapter(adapter, model) if reasoner else None
        check_windows(window, count)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        if merged is None:
            warn_of_other_weights(network, configs)
        limit = context_length(network)
        if limit is not None and window > limit:
            raise InputError(f"--window {window} is longer than the model's context of {limit} tokens.")
        encoded = [encode(tokenizer, problem) for problem in problem_set(reasoner, split=SPLIT)]
        longest = max((len(chain.tokens) for chain in encoded), default=0)
        if limit is not None and longest > limit:
            raise InputError(f"--reasoner: chains of {longest} tokens are longer than the model's context of {limit}.")
        if suite:
            found = _suite(network, max(window, longest))
            configs |= {name: config for name, config in found.items() if name not in configs}
        tokens = torch.cat(read_windows(tokenizer, text, window, count))
        with progress() as bar:
            task = bar.add_task("reading", total=len(tokens) * (len(configs) + 1))
            rows = measure.fidelity(
                network, tokens, configs, lambda name: bar.update(task, advance=1, description=f"read {name}")
            )
        print_table(fidelity_table(rows))
        chains = _chains(network, merged, encoded, configs) if encoded else {}
        about = {**inputs(model, text), "dtype": dtype, "window": window, **environment()}
        write_json(json_file, [{**row.as_dict(), **chains.get(row.cache, {}), **about} for row in rows])


def _suite(model: PreTrainedModel, length: int) -> dict[str, MixKVQConfig]:
    """Every system once: presets but those of the paper's other models, and calibrations for this one.

    Caches that narrow as they grow are planned for so many tokens.
    """
    names = [*(name for name in all_presets() if name not in ELSEWHERE), *shipped()]
    found = {}
    for name, config in parse_caches(names).items():
        if config.model not in (None, model_shape(model.config)):
            continue
        if config.plan_tokens is None:
            found[name] = config
        else:
            found[f"{name}:plan_tokens={length}"] = config.replace(plan_tokens=length)
    return found


def _chains(
    model: PreTrainedModel, adapter: Path | None, encoded: Sequence[Chain], configs: Mapping[str, MixKVQConfig]
) -> dict[str, dict[str, Any]]:
    """Print how right chains fare, and return it by cache, for JSON."""
    if adapter is not None:
        model = merge_adapter(model, adapter)
    with progress() as bar:
        task = bar.add_task("reading chains", total=len(encoded) * len(configs))
        rows = chain_fidelity(model, encoded, configs, lambda _: bar.update(task, advance=1))
    print_table(chain_table(rows))
    return {row.cache: {"chains": row.as_dict()} for row in rows}
