"""Where a figure was measured."""

from __future__ import annotations

import datetime
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers


def environment() -> dict[str, str | int]:
    """Command, machine, versions and date, to stand beside every measured figure."""
    return {
        "command": _command(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        **_gpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "transformers": transformers.__version__,
        "mixkvq": _version(),
        "date": datetime.date.today().isoformat(),
    }


def _command(arguments: Sequence[str]) -> str:
    """What was typed, but for where the results were written, and where else on this machine files lie."""
    after = ["", *arguments]
    kept = [word for word, before in zip(arguments, after, strict=False) if "--json" not in (word, before)]
    return shlex.join(["mixkvq", *(_portable(word) for word in kept if not word.startswith("--json="))])


def _portable(word: str) -> str:
    """A word whose path, if it has one that leads out of the working folder, is the file's name alone."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    outside = value.startswith(("/", "~", ".."))
    return option + equals + (Path(value).name if outside else value)


def _gpu() -> dict[str, str | int]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties()
    return {
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or "none",
        "driver": _driver(),
    }


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0].strip() or "unknown"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _version() -> str:
    import mixkvq

    return mixkvq.__version__


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
