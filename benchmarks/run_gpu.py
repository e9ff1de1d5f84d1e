"""All GPU measurements of the documentation, in one go of a few minutes on an H100 or H200.

From the repository's root::

    python benchmarks/run_gpu.py benchmarks/h200 [--only kernel --only capacity]

Writes a JSON file for each command, and the pictures, to the folder. A command that fails does not stop the
others; the exit status says whether any did.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from pathlib import Path

import torch

from mixkvq.cli import app

MODEL = "--shape llama-3.1-8b"
#: Settings by layer for 32 layers: those of ``default-smollm2-135m.json``, two of them twice. For speed alone.
CALIBRATED = "benchmarks/calibrated_32_layers.json"
#: Commands by the file that they write, quickest answers first.
COMMANDS = {
    "kernel": "bench kernel --cache default --cache kivi-4 --cache paper:tau_bf16=5.2,tau_uint4=3.214 "
    "--cache kivi-2 --batch 8 --context 32768 --batch 1 --context 131072 --batch 32 --context 4096",
    "kernel_contexts": "bench kernel --cache default --batch 8 --context 4096 --context 8192 "
    "--context 16384 --context 32768 --context 65536",
    "kernel_widths": "bench kernel --cache default --cache default:value_bits=3 --cache default:value_bits=8 "
    "--cache quality --cache quality:key_bits=8,key_group=128 --cache kivi-2:key_bits=3 --batch 8 --context 32768",
    "prefill": f"bench prefill {MODEL} --batch 1 --context 16384 --repeats 3",
    "capacity": f"bench capacity {MODEL} --context 16384",
    "generate": f"bench generate {MODEL} --batch 1 --context 32768 --batch 8 --context 4096 "
    "--batch 8 --context 16384 --batch 8 --context 32768 --batch 24 --context 16384 --batch 1 --context 131072",
    "generate_calibrated": f"bench generate {MODEL} --batch 8 --context 16384 --batch 24 --context 16384 "
    f"--cache default --cache {CALIBRATED}",
}


def run(command: str, file: Path) -> bool:
    """One command as if it had been typed; returns whether it wrote its file."""
    sys.argv = ["mixkvq", *shlex.split(command), "--json", str(file)]
    print("$", shlex.join(sys.argv), flush=True)
    file.unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        app(sys.argv[1:], standalone_mode=False)
    except (Exception, SystemExit) as error:  # whatever it was, the other commands are worth their time
        print(f"failed: {type(error).__name__}: {error}", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return file.exists()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("results", type=Path, help="the folder for the JSON files")
    parser.add_argument("--only", action="append", choices=COMMANDS, help="run this one; may be repeated")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    files = {name: arguments.results / f"{name}.json" for name in arguments.only or COMMANDS}
    failed = [name for name, file in files.items() if not run(COMMANDS[name], file)]
    drawn = [str(file) for file in files.values() if file.exists()]
    if drawn:
        app(["bench", "plot", *drawn, "--out", str(arguments.results / "plots")], standalone_mode=False)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
