"""``mixkvq bench kernel``: attention of one decode step of one layer, on a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from mixkvq.cli.bench.common import BatchOption, ContextOption, check_positive, pairs, require_gpu, spinner, write_rows
from mixkvq.cli.common import CacheHelp, InputError, JsonOption, clean_exit, parse_caches, print_table
from mixkvq.cli.files import check_writable
from mixkvq.kernels.decode import KERNELS
from mixkvq.report.bench import kernel_table

KERNEL_NAMES = ", ".join(("auto", *KERNELS))


def kernel(
    batch: BatchOption = None,
    context: ContextOption = None,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    group: Annotated[int, typer.Option(help="Query heads of each KV head.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 128,
    cache: Annotated[list[str] | None, typer.Option(help=CacheHelp)] = None,
    kernel: Annotated[str, typer.Option(help=f"Which of ours: {KERNEL_NAMES}.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed calls of each kernel.")] = 60,
    json_file: JsonOption = None,
) -> None:
    """Time attention of one decode step of one layer against the fastest over a BF16 cache, and check the result.

    Without --batch, --context and --cache: 8 sequences of 32,768 tokens in the `default` cache.
    """
    with clean_exit():
        check_writable(json_file)
        points = pairs(batch, context, 8, 32768)
        check_positive(kv_heads=kv_heads, group=group, head_dim=head_dim, repeats=repeats)
        if kernel not in ("auto", *KERNELS):
            raise InputError(f"There is no kernel '{kernel}'. Known: {KERNEL_NAMES}.")
        configs = parse_caches(cache or ["default"])
        require_gpu("bench kernel")
        from mixkvq.bench.kernel import KernelShape, WrongResultError, bench_kernel

        shapes = [KernelShape(size, kv_heads, group, head_dim, length) for size, length in points]
        with spinner("kernels") as advance:
            try:
                rows = bench_kernel(shapes, configs, kernel=kernel, repeats=repeats, advance=advance)
            except WrongResultError as error:
                raise InputError(str(error)) from error
        print_table(kernel_table(rows))
        write_rows(json_file, rows)
