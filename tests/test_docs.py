"""What the documentation tells people to type."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.cli import app
from mixkvq.models import attention
from models import VOCABULARY, tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
PAGES += sorted((ROOT / "recipes").glob("*/README.md"))


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        found += [(page.name, block) for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]
    return found


def commands() -> list[str]:
    lines = [line for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip().startswith("mixkvq ")]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words, f"{line} is not whole"
        command = command.commands[words.pop(0)]
    context = command.make_context(line, words)
    chosen = context.params.get("cache")
    for cache in [chosen] if isinstance(chosen, str) else chosen or []:
        MixKVQConfig.parse(cache)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [
        line.split()[1] for _, block in blocks("bash") for line in block.splitlines() if line.startswith("make ")
    ]
    assert "demo" in targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


class Words:
    """A tokenizer that knows numbers only."""

    @staticmethod
    def from_pretrained(_: str) -> "Words":
        return Words()

    def __call__(self, *_: object, **__: object) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCABULARY, (1, 300))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, tokens: torch.Tensor, **_: object) -> str:
        return " ".join(map(str, tokens.tolist()))


class Tiny:
    """Stands for AutoModelForCausalLM."""

    @staticmethod
    def from_pretrained(_: str, **options: object) -> torch.nn.Module:
        assert options["attn_implementation"] == "mixkvq"
        return tiny_model("qwen3")


@pytest.mark.parametrize("page", ["README.md", "transformers.md", "conf_kv.md"])
def test_python_snippets_run(page: str):
    model = tiny_model("qwen3")
    code = "\n".join(block for name, block in blocks("python") if name == page)
    assert "MixKVQCache" in code
    code = re.sub(r"from transformers import .*", "", code)
    space = {"AutoModelForCausalLM": Tiny, "AutoTokenizer": Words, "model": model}
    with attention(model, "mixkvq"):
        exec(compile(code, page, "exec"), space)
        if page == "transformers.md":
            cache = space["cache"]
            assert isinstance(cache, MixKVQCache)
            model(Words()()["input_ids"], past_key_values=cache)
            assert cache.memory().key_bits_codes == 3.0
