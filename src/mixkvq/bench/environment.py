"""Where a figure was measured."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch
import transformers


def environment() -> dict[str, str | int]:
    """Machine, versions and date, to stand beside every measured figure."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mixkvq": _version(),
        "date": datetime.date.today().isoformat(),
    }


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
