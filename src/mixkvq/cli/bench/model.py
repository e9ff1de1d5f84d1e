"""``mixkvq bench generate | capacity | prefill``: a whole model, ours against a BF16 cache."""

from __future__ import annotations

from typing import Annotated

import typer

from mixkvq.cli.bench.common import (
    BatchOption,
    ContextOption,
    RealModelOption,
    ShapeOption,
    check_positive,
    chosen_model,
    pairs,
    parse_size,
    spinner,
    write_rows,
)
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    DtypeOption,
    InputError,
    JsonOption,
    clean_exit,
    parse_caches,
    print_table,
)
from mixkvq.cli.files import check_writable
from mixkvq.report.bench import capacity_table, generate_table, prefill_table

CachesOption = Annotated[list[str] | None, typer.Option("--cache", help=f"{CacheHelp}; without, `default`.")]


def generate(
    shape: ShapeOption = None,
    model: RealModelOption = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    cache: CachesOption = None,
    steps: Annotated[int, typer.Option(help="Timed steps.")] = 128,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Tokens per second and peak memory of decoding with a context already in the cache.

    Random keys and values fill the caches, and on a GPU every step is one CUDA graph. Without --batch and --context: 8
    sequences of 16,384 tokens.
    """
    with clean_exit():
        check_writable(json_file)
        points, configs = pairs(batch, context, 8, 16384), parse_caches(cache or ["default"])
        check_positive(steps=steps)
        network, name = chosen_model(shape, model, dtype, device)
        from mixkvq.bench.generate import bench_generate

        with spinner("decoding") as advance:
            rows = bench_generate(network, points, configs, steps=steps, advance=advance)
        print_table(generate_table(rows, name))
        write_rows(json_file, rows, model=name, dtype=dtype)


def capacity(
    shape: ShapeOption = None,
    model: RealModelOption = None,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 16384,
    memory: Annotated[str, typer.Option(help="What may be used, as 78GB; auto is all of the GPU's.")] = "auto",
    cache: CachesOption = None,
    steps: Annotated[int, typer.Option(help="Timed steps at the largest batch.")] = 64,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """The most sequences that fit into memory, found by holding them, and tokens per second with that many."""
    with clean_exit():
        check_writable(json_file)
        check_positive(context=context, steps=steps)
        limit, configs = None if memory == "auto" else parse_size(memory), parse_caches(cache or ["default"])
        network, name = chosen_model(shape, model, dtype, device)
        if limit is None and network.device.type != "cuda":
            raise InputError("--memory auto is a GPU's memory, and this model is on a CPU: give a size, as 2GB.")
        from mixkvq.bench.capacity import NoRoomError, bench_capacity

        with spinner("capacity") as advance:
            try:
                rows = bench_capacity(network, context, configs, memory=limit, steps=steps, advance=advance)
            except NoRoomError as error:
                raise InputError(str(error)) from error
        print_table(capacity_table(rows, name))
        write_rows(json_file, rows, model=name, dtype=dtype)


def prefill(
    shape: ShapeOption = None,
    model: RealModelOption = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    cache: CachesOption = None,
    repeats: Annotated[int, typer.Option(help="Timed prompts.")] = 5,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time to read a prompt, packing included. Without --batch and --context: one of 16,384 tokens."""
    with clean_exit():
        check_writable(json_file)
        points, configs = pairs(batch, context, 1, 16384), parse_caches(cache or ["default"])
        check_positive(repeats=repeats)
        network, name = chosen_model(shape, model, dtype, device)
        from mixkvq.bench.prefill import bench_prefill

        with spinner("prompts") as advance:
            rows = bench_prefill(network, points, configs, repeats=repeats, advance=advance)
        print_table(prefill_table(rows, name))
        write_rows(json_file, rows, model=name, dtype=dtype)
