"""Pictures are drawn from what the commands write."""

import builtins
import json
from pathlib import Path

import pytest

from mixkvq.report.figures import PlotError
from mixkvq.report.plots import draw, plot_files

ABOUT = {"device": "GPU", "model": "llama"}
KERNEL = [
    {"cache": cache, "batch": 8, "context": context, "time_us": 50.0, "speed_up": speed, **ABOUT}
    for context in (8192, 4096)
    for cache, speed in (("bf16", 1.0), ("default", 3.0), ("kivi-2", 3.5))
]
DECODING = {"kernel": "some", "step_ms": 9.0, **ABOUT}
GENERATE = [
    {
        "cache": cache,
        "batch": batch,
        "context": context,
        "tokens_per_second": 1e3 * batch,
        "cache_bytes": 1e9,
        **DECODING,
    }
    for batch, context in ((1, 4096), (8, 4096), (8, 8192))
    for cache in ("bf16", "default")
]
CAPACITY = [
    {"cache": "default", "batch": 99, "batch_ratio": 6.0, "context": 4096, "tokens_per_second": 9e4, **DECODING},
]


def write(folder: Path, **files: object) -> list[Path]:
    for name, rows in files.items():
        (folder / name).write_text(json.dumps(rows))
    return [folder / name for name in files]


def test_pictures_of_everything(tmp_path: Path):
    files = write(tmp_path, kernel=KERNEL, generate=GENERATE, capacity=CAPACITY)
    written = plot_files(files, tmp_path / "plots" / "new")
    names = ["kernel-speed-up", "throughput-llama-4096", "memory-llama"]
    assert [path.name for path in written] == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    assert all(path.stat().st_size > 1000 for path in written)


def test_lines_hold_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []
    monkeypatch.setattr("mixkvq.report.plots.draw", lambda picture: seen.append(picture) or draw(picture))
    failed = {"cache": "bf16", "batch": 99, "context": 4096, "tokens_per_second": 0.0, **DECODING}
    slower = {**GENERATE[0], "tokens_per_second": 1.0}
    plot_files(write(tmp_path, a=KERNEL, b=[*GENERATE, failed, slower], c=CAPACITY), tmp_path)
    kernel, throughput, memory = seen
    assert kernel.lines == {
        "default, batch 8": [(4096, 3.0), (8192, 3.0)],
        "kivi-2, batch 8": [(4096, 3.5), (8192, 3.5)],
    }
    assert throughput.lines == {"bf16": [(1, 1e3), (8, 8e3)], "default": [(1, 1e3), (8, 8e3), (99, 9e4)]}
    assert memory.lines["bf16"] == [(4096, 0.125), (8192, 0.125)]


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PlotError, match="nothing to draw"):
        plot_files(write(tmp_path, one=KERNEL[:3]), tmp_path)
    with pytest.raises(PlotError, match="does not hold results"):
        plot_files(write(tmp_path, other={"a": 1}), tmp_path)
    with pytest.raises(PlotError, match="does not hold results"):
        plot_files(write(tmp_path, nowhere=[{"cache": "default", "time_us": 50.0}]), tmp_path)
    with pytest.raises(PlotError, match="Cannot write pictures"):
        plot_files(write(tmp_path, kernel=KERNEL), tmp_path / "kernel")
    with pytest.raises(PlotError, match="Cannot read"):
        plot_files([tmp_path / "nowhere.json"], tmp_path)
    real = builtins.__import__

    def missing(name: str, *arguments: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PlotError, match=r'pip install "mixkvq\[plots\]"'):
        plot_files(write(tmp_path, kernel=KERNEL), tmp_path)
