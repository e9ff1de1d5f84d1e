"""``mixkvq calibrate``: find a configuration for a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.bench.environment import environment
from mixkvq.calibrate.budget import Choice, Menu, Text, check_base, key_options, measure_menu, smallest, value_options
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.kvmix import gradient_norms
from mixkvq.calibrate.kvquant import check_base as check_levels_base
from mixkvq.calibrate.kvquant import layer_levels
from mixkvq.calibrate.layers import with_layers
from mixkvq.calibrate.thresholds import thresholds_for_bits
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    JsonOption,
    ModelOption,
    ReasonerOption,
    TextOption,
    WindowsOption,
    check_writable,
    clean_exit,
    inputs,
    load_model,
    notes,
    output,
    parse_dtype,
    progress,
    reasoner_adapter,
    write_json,
)
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import fidelity as measure
from mixkvq.evaluate.chains import encode
from mixkvq.evaluate.likelihood import pieces
from mixkvq.evaluate.problems import problem_set
from mixkvq.evaluate.texts import windows
from mixkvq.models import DEFAULT_MODEL, merge_adapter
from mixkvq.policies.kvmix import allocate_layers
from mixkvq.report.tables import calibration_table

calibrate = typer.Typer(help="Find a configuration for a model.", no_args_is_help=True)


#: Problems whose chains are calibrated on; others judge what was found.
SPLIT = "calibration"

TrialsOption = Annotated[
    Path | None, typer.Option("--trials", help="Keep measurements here, and go on from those that are there.")
]


@calibrate.callback()
def _group() -> None:
    pass


@calibrate.command()
def thresholds(
    bits: Annotated[float, typer.Option(help="Mean code bits of a key channel.")] = 2.3,
    bf16_share: Annotated[float, typer.Option(help="Share of channels to leave in BF16.")] = 0.01,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 4,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="The model's type.")] = "float32",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Thresholds of the paper's tiers at which the `paper` cache spends the given bits, from quantiles of saliences."""
    with clean_exit():
        check_writable(json_file)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        tokens = windows(tokenizer, text or [None], window, count)
        with progress() as bar:
            task = bar.add_task("reading", total=len(tokens))
            found = thresholds_for_bits(network, tokens, bits, bf16_share, lambda: bar.advance(task))
        output.print(f"paper:tau_bf16={found.tau_bf16:.4g},tau_uint4={found.tau_uint4:.4g}", soft_wrap=True)
        about = {"model": model or DEFAULT_MODEL, "bits": found.bits, **environment()}
        write_json(json_file, {**dataclasses.asdict(found), **about})


@calibrate.command()
def budget(
    out: Annotated[Path, typer.Argument(help="The calibration to write, a JSON file for --cache.")],
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "default",
    bits: Annotated[
        float | None, typer.Option(help="Mean honest bits to spend.", show_default="what the cache spends")
    ] = None,
    kl: Annotated[
        float | None, typer.Option(help="Instead of bits: spend as few as keep the KL within so many nats per token.")
    ] = None,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 2,
    reasoner: Annotated[
        int,
        typer.Option(help="Also calibrate on the right chains of so many problems, by a model that solves them."),
    ] = 0,
    adapter: ReasonerOption = None,
    seed: Annotated[int, typer.Option(help="Of the labels whose gradients are taken.")] = 0,
    trials: TrialsOption = None,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="The model's type.")] = "float32",
    device: DeviceOption = None,
) -> None:
    """Which layers' keys and values earn more bits: settings by layer, better at the same size."""
    with clean_exit(), _kept(trials):
        check_writable(out)
        base = MixKVQConfig.parse(cache)
        check_base(base)
        if bits is not None and kl is not None:
            raise CalibrationError("Give --bits or --kl, not both.")
        if window < 2 * measure.WARM_UP:
            raise CalibrationError(
                f"--window {window}: take at least {2 * measure.WARM_UP} tokens, of which the first {measure.WARM_UP} "
                "are not scored."
            )
        merged = reasoner_adapter(adapter, model) if reasoner else None
        about = {
            "cache": cache,
            "config": base.as_dict(),
            **inputs(model, text),
            "adapter": None if merged is None else merged.name,
            "dtype": dtype,
            "window": window,
            "windows": count,
            "reasoner": reasoner,
            "seed": seed,
            "options": {"keys": key_options(base), "values": value_options()},
        }
        journal = Trials(trials, about)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        # Twice as many as asked for: on the second half it is checked what was found on the first.
        tokens = windows(tokenizer, text or [None], window, 2 * count)
        if len(tokens) < 2:
            raise CalibrationError(
                f"The text has one window of {window} tokens, and two are needed: what is found on one is checked on "
                "the other. Give a longer text, or a smaller --window."
            )
        if merged is not None:
            network = merge_adapter(network, merged)
        bounds = measure.appends(window, base)
        texts = [Text(f"window {i}", each, bounds, measure.WARM_UP) for i, each in enumerate(tokens[::2])]
        texts += _chains(tokenizer, base, reasoner, len(texts) / max(reasoner, 1))
        held_out = tokens[1::2]
        with progress() as bar:
            task = bar.add_task("gradients", total=len(texts) * (1 + len(key_options(base))))
            menu = measure_menu(
                network,
                base,
                texts,
                journal,
                seed=seed,
                advance=lambda what: bar.update(task, advance=1, description=what),
            )
        plain = _kl(network, held_out, journal, "uniform", base)
        choice, found = _search(
            menu,
            bits,
            kl,
            plain["bits"],
            lambda name, it: _kl(network, held_out, journal, name, it.config(base, network)),
        )
        results = {
            "uniform": plain,
            "found": found,
            "predicted": choice.predicted,
            "menu": dataclasses.asdict(menu),
        }
        Calibration(choice.config(base, network), "budget", {**about, **environment()}, results).write(out)
        output.print(calibration_table(cache, plain, found))
        output.print(f"Wrote {out}; use it with --cache {out}", soft_wrap=True)


@contextmanager
def _kept(trials: Path | None) -> Iterator[None]:
    """Say what an interruption has left."""
    try:
        yield
    except KeyboardInterrupt:
        if trials is None:
            raise
        notes.print(f"Interrupted; what was measured is in {trials}. The same command goes on from there.")
        raise typer.Exit(130) from None


def _chains(tokenizer: PreTrainedTokenizerBase, base: MixKVQConfig, count: int, weight: float) -> list[Text]:
    chains = [encode(tokenizer, problem) for problem in problem_set(count, split=SPLIT)]
    return [
        Text(
            f"chain {i}", chain.tokens[:-1], pieces(chain.prompt, len(chain.tokens) - 1, base), chain.prompt - 1, weight
        )
        for i, chain in enumerate(chains)
    ]


def _kl(model: PreTrainedModel, held_out: Any, journal: Trials, name: str, config: MixKVQConfig) -> dict[str, float]:
    """KL and bits of a cache over text that was not calibrated on."""

    def read() -> dict[str, float]:
        with progress() as bar:
            task = bar.add_task(f"checking {name}", total=2 * len(held_out))
            row = measure.fidelity(model, held_out, {name: config}, lambda _: bar.advance(task))[0]
        return {"kl": row.kl, "bits": row.bits, "perplexity": row.perplexity}

    return journal.once(f"KL of {hashlib.sha256(config.to_json().encode()).hexdigest()[:16]}", read)


def _search(
    menu: Menu,
    bits: float | None,
    kl: float | None,
    default_bits: float,
    check: Callable[[str, Choice], dict[str, float]],
) -> tuple[Choice, dict[str, float]]:
    if kl is None:
        choice = menu.choose(default_bits if bits is None else bits)
        return choice, check(f"{choice.bits:.3f} bits", choice)
    checked: dict[float, dict[str, float]] = {}

    def kl_of(choice: Choice) -> float:
        checked[choice.bits] = check(f"{choice.bits:.3f} bits", choice)
        return checked[choice.bits]["kl"]

    choice, _ = smallest(menu, kl, kl_of)
    return choice, checked[choice.bits]


@calibrate.command()
def kvmix(
    out: Annotated[Path, typer.Argument(help="The calibration to write, a JSON file for --cache.")],
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    count: Annotated[int, typer.Option("--windows", help="Prompts of each text.")] = 24,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="The model's type.")] = "float32",
    device: DeviceOption = None,
) -> None:
    """KVmix's profile: the layers with the largest gradients get 3-bit keys and 4-bit values, the others 2 bits."""
    with clean_exit():
        check_writable(out)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        prompts = windows(tokenizer, text or [None], window, count)
        with progress() as bar:
            task = bar.add_task("gradients", total=len(prompts))
            keys, values = gradient_norms(network, prompts, lambda: bar.advance(task))
        fields = allocate_layers(keys, values)
        config = with_layers(MixKVQConfig.preset("kvmix"), fields, network)
        about = {**inputs(model, text), "window": window, "windows": count, **environment()}
        Calibration(config, "kvmix", about, {"key_norms": keys, "value_norms": values}).write(out)
        for name, bits in (("keys of 3 bits", "key_bits"), ("values of 4 bits", "value_bits")):
            output.print(f"{name}: layers {', '.join(str(i) for i, own in fields.items() if bits in own)}")
        output.print(f"Wrote {out}; use it with --cache {out}", soft_wrap=True)


@calibrate.command()
def kvquant(
    out: Annotated[Path, typer.Argument(help="The calibration to write, a JSON file for --cache.")],
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "kvquant-2",
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 4,
    seed: Annotated[int, typer.Option(help="Of the labels whose gradients are taken.")] = 0,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="The model's type.")] = "float32",
    device: DeviceOption = None,
) -> None:
    """KVQuant's levels: what codes stand for in each layer, fitted where errors cost most."""
    with clean_exit():
        check_writable(out)
        base = MixKVQConfig.parse(cache)
        check_levels_base(base)
        smallest_window = max(2 * measure.WARM_UP, base.sinks + base.residual_length + 1)
        if window < smallest_window:
            raise CalibrationError(f"--window {window}: take at least {smallest_window} tokens, a block and more.")
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        texts = windows(tokenizer, text or [None], window, count)
        generator = torch.Generator(device=network.device).manual_seed(seed)
        bounds = measure.appends(window, base)
        with progress() as bar:
            task = bar.add_task("gradients", total=len(texts))
            fields = layer_levels(network, texts, base, bounds, measure.WARM_UP, generator, lambda: bar.advance(task))
        config = with_layers(base, fields, network)
        about = {
            "cache": cache,
            **inputs(model, text),
            "dtype": dtype,
            "window": window,
            "windows": count,
            "seed": seed,
            **environment(),
        }
        Calibration(config, "kvquant", about, {}).write(out)
        output.print(f"Wrote {out}; use it with --cache {out}", soft_wrap=True)
