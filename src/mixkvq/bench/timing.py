"""Timing on a GPU: graphs, events, cold caches, contenders in turn. On a CPU the clock, for tests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

#: Bytes written and read between timed runs, several times the level-2 cache of any card.
FLUSHED = 1 << 28
#: Bytes that are copied to learn the card's rate.
COPIED = 1 << 30
#: Untimed calls before the timed ones; the first ones compile.
WARM_UP = 3

Call = Callable[[], object]


def captured(call: Call) -> Call:
    """The call as one CUDA graph, after a warm-up that compiles whatever it launches.

    Memory that it allocates belongs to the graph, and its result is found where the captured run put it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Timer:
    """Medians of contenders that are run in turn, each run with a cold cache.

    Args:
        device: a CUDA device, where every contender becomes a graph; or the CPU, where it is called as it is.
        flushed: bytes that are written and then read between runs. Reading them leaves no dirty lines behind, whose
            writing back would count against the next run.
    """

    def __init__(self, device: torch.device, flushed: int = FLUSHED) -> None:
        self.device = device
        self.buffer = torch.empty(flushed // 4, dtype=torch.int32, device=device)

    def medians(self, calls: Mapping[str, Call], repeats: int, *, eager: Collection[str] = ()) -> dict[str, float]:
        """Median seconds of each call, by its name; those named in ``eager`` wait for the host and make no graph."""
        if self.device.type != "cuda":
            return {name: statistics.median(times) for name, times in self._on_cpu(calls, repeats).items()}
        runs = {name: call if name in eager else captured(call) for name, call in calls.items()}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(WARM_UP + repeats):
            for name, run in runs.items():
                self._flush()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize(self.device)
        return {
            name: statistics.median(1e-3 * start.elapsed_time(end) for start, end in pairs[WARM_UP:])
            for name, pairs in events.items()
        }

    def _on_cpu(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(WARM_UP + repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        return {name: all_times[WARM_UP:] for name, all_times in times.items()}

    def _flush(self) -> None:
        self.buffer.fill_(1)
        self.buffer.amax()

    def copy_rate(self, size: int = COPIED, repeats: int = 20) -> float:
        """Bytes per second of a copy within the device's memory, bytes read and bytes written together.

        The faster of torch's copy, which a graph hands to the driver, and a kernel that reads and writes.
        """
        source = torch.randint(-(1 << 31), 1 << 31, (size // 4,), dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        calls: dict[str, Call] = {
            "copy": lambda: target.copy_(source),
            "kernel": lambda: torch.bitwise_not(source, out=target),
        }
        return 2 * source.nbytes / min(self.medians(calls, repeats).values())


def relative_error(output: Tensor, expected: Tensor) -> float:
    """The largest error of a vector, ``|output - expected| / |expected|`` over the last dimension; inf for NaN."""
    error = (output.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(error.nan_to_num(nan=float("inf")).amax())
