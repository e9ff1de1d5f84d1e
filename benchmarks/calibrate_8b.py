"""What calibrating takes with a model of 8B parameters: seconds and peak memory of every command.

From the repository's root, on a GPU of 48 GB or more::

    python benchmarks/calibrate_8b.py benchmarks/h100/calibrate_8b.json [--only budget --only kvmix]

The model has the shape of Llama-3.1-8B and random weights, so times and bytes are real and what is found means nothing.
Its tokenizer is trained on Python's language reference in a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mixkvq.bench.shapes import SHAPES, random_model
from mixkvq.evaluate.texts import read_text

#: Commands with their default settings, but for how long searches are: those take as long as they are asked to.
COMMANDS = {
    "budget": [],
    "channels": [],
    "kvmix": [],
    "kvquant": [],
    "kvtuner": ["--tries", "10", "--bits", "5"],
    "pm-kvq": [],
    "thresholds": ["--tries", "10", "--bits", "3"],
}


def save_model(folder: Path, shape: str) -> None:
    """A model of random weights, and a tokenizer for it."""
    model = random_model(shape, torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    size = min(4096, model.config.vocab_size)
    tokenizer.train_from_iterator([read_text(None)], trainers.BpeTrainer(vocab_size=size, special_tokens=["</s>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def measure(command: str, options: list[str], folder: Path) -> dict[str, object]:
    """One command in a process of its own, so that its peak memory is its own."""
    out = folder / f"{command}.json"
    start = [sys.executable, "-c", "from mixkvq.cli import app; app()"]
    words = ["calibrate", command, str(out), "--model", str(folder), "--dtype", "bfloat16", *options]
    print("$ mixkvq", *words, flush=True)
    done = subprocess.run([*start, *words], check=False)
    if done.returncode:
        return {"command": command, "options": options, "failed": done.returncode}
    about = json.loads(out.read_text())["about"]
    kept = ("window", "windows", "seconds", "peak_gpu_bytes", "dtype", "device", "torch", "transformers", "date")
    return {"command": command, "options": options, **{name: about[name] for name in kept if name in about}}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("results", type=Path, help="the JSON file; rows of other commands that it has are kept")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--only", action="append", choices=COMMANDS, help="run this one; may be repeated")
    arguments = parser.parse_args()
    out, wanted = arguments.results, arguments.only or list(COMMANDS)
    before = json.loads(out.read_text()) if out.exists() else []
    rows = [row for row in before if row["command"] not in wanted]
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), arguments.shape)
        for command in wanted:
            rows.append({"shape": arguments.shape, **measure(command, COMMANDS[command], Path(name))})
            out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
