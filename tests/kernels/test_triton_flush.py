"""The fused flush equals the torch path: plan, quantize, pack. Runs on a GPU, or interpreted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import WITH_RULES, layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.kernels.triton import available
from mixkvq.kernels.triton.pack import pack_blocks
from mixkvq.kernels.triton.plan import plan_blocks
from mixkvq.layers import Step
from mixkvq.policies import KeyBlock, PlanRule, Policy, policy_class
from mixkvq.policies.kivi import KIVI
from mixkvq.policies.mixkvq import MixKVQ
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store import PagedStore

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THRESHOLDS = "paper:tau_bf16=2.2,tau_uint4=1.2"

pytestmark = pytest.mark.skipif(not available(DEVICE), reason="Triton needs a GPU or TRITON_INTERPRET=1")


@dataclass
class Blocks:
    """Blocks of a step, and a store on the CPU into which the torch path packed them."""

    config: MixKVQConfig
    step: Step
    rows: list[int]
    starts: list[int]
    bits: Tensor
    store: PagedStore
    rotated: bool

    @classmethod
    def of(cls, config: MixKVQConfig, step: Step, rows: list[int], starts: list[int]) -> Blocks:
        cache = layer_cache(config, step)
        store, layout = cache.store, cache.store.layout
        keys, values = (
            torch.stack([x[row, :, start : start + layout.tokens] for row, start in zip(rows, starts, strict=True)])
            for x in (step.keys, step.values)
        )
        importance = torch.rand(len(rows), layout.kv_heads, layout.key_dim) + 0.5
        bits = policy_class(config.policy)(config).plan(KeyBlock(keys, importance))
        store.write(
            rows,
            *cache.recipe.quantize(keys, values, bits, None),
        )
        return cls(config, step, rows, starts, bits, store, cache.rotated)

    @property
    def pages(self) -> list[int]:
        """Each block's page in the store."""
        next_page = [iter(table) for table in self.store.tables]
        return [next(next_page[row]) for row in self.rows]

    def pack(
        self, keys: Tensor | None = None, values: Tensor | None = None, numbers: list[int] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The kernel's pages and chunks, on the CPU; what it did not write is 0xFF."""
        pages = torch.full_like(self.store.pages.data, 0xFF, device=DEVICE)
        chunks = {bits: torch.full_like(pool.data, 0xFF, device=DEVICE) for bits, pool in self.store.chunks.items()}
        runs = {bits: [pool.runs[page][0] for page in self.pages] for bits, pool in self.store.chunks.items()}
        pack_blocks(
            (self.step.keys if keys is None else keys).to(DEVICE),
            (self.step.values if values is None else values).to(DEVICE),
            integers(self.rows),
            integers(self.starts),
            self.bits.to(DEVICE),
            integers(self.pages if numbers is None else numbers),
            {bits: integers(run) for bits, run in runs.items()},
            pages,
            chunks,
            self.store.layout,
            key_clip=self.config.key_clip,
            key_unbiased=self.config.key_unbiased,
            value_clip=self.config.value_clip,
            value_unbiased=self.config.value_unbiased,
            rotated=self.rotated,
        )
        return pages.cpu(), {bits: pool.cpu() for bits, pool in chunks.items()}

    def fields(self, pages: Tensor, chunks: dict[int, Tensor]) -> dict[str, Tensor]:
        """Every field of the records in use."""
        layout = self.store.layout
        fields = {name: view[self.pages] for name, view in layout.page.views(pages).items()}
        for bits, pool in chunks.items():
            used = self.store.chunks[bits].top
            views = layout.chunks[bits].views(pool)
            fields |= {f"{bits} {name}": view[:used] for name, view in views.items()}
        return fields

    def content(self, pages: Tensor, chunks: dict[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of every row, dequantized."""
        self.store.pages.data, self.store._packed = pages, None
        for bits, pool in chunks.items():
            self.store.chunks[bits].data = pool
        return {row: dequantize_pages(self.store.packed(), row, rotated=self.rotated) for row in set(self.rows)}

    def check(self) -> None:
        """The kernel writes what the torch path wrote, but for codes on the verge of another."""
        own = self.store.pages.data, {bits: pool.data for bits, pool in self.store.chunks.items()}
        packed = self.pack()
        expected, written = self.fields(*own), self.fields(*packed)
        for name, field in expected.items():
            wrong = int((~torch.isclose(field.float(), written[name].float(), rtol=1e-5, atol=0)).sum())
            index = any(part in name for part in ("run", "first_lane", "channel"))
            assert wrong <= (0 if index else max(1, 2e-3 * field.numel())), f"{name}: {wrong} of {field.numel()} differ"
        expected, written = self.content(*own), self.content(*packed)
        for row in expected:
            for x, y in zip(expected[row], written[row], strict=True):
                wrong = ~torch.isclose(x, y, rtol=1e-4, atol=1e-4 * float(x.abs().mean()))
                assert wrong.float().mean() <= 2e-2  # a channel whose clipping range was a tie


def integers(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def some_blocks(config: MixKVQConfig, **shape) -> Blocks:
    """Three blocks of two rows at odd places, in one call."""
    size = config.residual_length
    return Blocks.of(config, random_step(2, 2 * size + 9, **shape), [1, 0, 1], [9, 0, size + 9])


# Quantize and pack


def test_it_writes_what_the_torch_path_writes(kernel_config: MixKVQConfig):
    some_blocks(kernel_config).check()


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("default", {"dim": 80, "kv_heads": 1, "dtype": torch.bfloat16}),
        ("default", {"dim": 24, "kv_heads": 3, "heads": 3, "dtype": torch.float16}),
        ("default:residual_length=16,key_group=16", {"dim": 96, "dtype": torch.bfloat16}),
        ("default:residual_length=32,key_group=16,scale_dtype=float32", {"dim": 5}),
        (f"{THRESHOLDS},residual_length=32", {"dim": 48, "dtype": torch.bfloat16}),
        (f"{THRESHOLDS},residual_length=64", {"dim": 16, "dtype": torch.float16}),
        ("kitty:residual_length=32,key_group=32", {"dim": 20, "kv_heads": 4}),
        ("kivi-4:residual_length=64", {"dim": 40}),
    ],
)
def test_shapes_and_types(text: str, shape: dict):
    some_blocks(MixKVQConfig.parse(text), **shape).check()


def test_key_and_value_dimensions_may_differ():
    step = random_step(2, 80, dim=24)
    step = Step(step.query, step.keys, torch.randn(2, 2, 80, 40))
    Blocks.of(MixKVQConfig.parse("default:residual_length=32,key_group=32"), step, [0, 1, 1], [3, 0, 40]).check()


@pytest.mark.parametrize("text", ["default", THRESHOLDS])
def test_sources_may_be_strided(text: str):
    blocks = some_blocks(MixKVQConfig.parse(text))
    pages, chunks = blocks.pack()
    keys, values = blocks.step.keys, blocks.step.values
    by_token = keys.transpose(1, 2).contiguous().transpose(1, 2)
    wider = torch.full((*values.shape[:2], values.shape[2] + 5, 3 * values.shape[3]), torch.nan)
    view = wider[:, :, 5:, 16:32]
    view.copy_(values)
    strided_pages, strided_chunks = blocks.pack(by_token, view)
    assert torch.equal(pages, strided_pages)
    assert all(torch.equal(chunks[bits], strided_chunks[bits]) for bits in chunks)


@pytest.mark.parametrize("text", ["default", THRESHOLDS, "bf16"])
def test_blocks_without_a_page_are_left_out(text: str):
    blocks = some_blocks(MixKVQConfig.parse(text))
    pages, chunks = blocks.pack()
    some_pages, some_chunks = blocks.pack(numbers=[blocks.pages[0], -1, blocks.pages[2]])
    assert (some_pages[blocks.pages[1]] == 0xFF).all()
    for page in (blocks.pages[0], blocks.pages[2]):
        assert torch.equal(some_pages[page], pages[page])
    for bits, pool in chunks.items():
        start, count = blocks.store.chunks[bits].runs[blocks.pages[1]]
        assert (some_chunks[bits][start : start + count] == 0xFF).all()
        pool[start : start + count] = 0xFF
        assert torch.equal(some_chunks[bits], pool)
    nothing, no_chunks = blocks.pack(numbers=[-1, -1, -1])
    assert (nothing == 0xFF).all()
    assert all((pool == 0xFF).all() for pool in no_chunks.values())


def test_no_blocks():
    blocks = Blocks.of(MixKVQConfig.parse("kivi-2"), random_step(1, 200), [0], [0])
    blocks.rows, blocks.starts, blocks.bits = [], [], blocks.bits[:0]
    pages, _ = blocks.pack()
    assert (pages == 0xFF).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("text", ["default", THRESHOLDS, "kivi-2:residual_length=32"])
def test_a_block_that_is_not_finite_leaves_the_others_alone(text: str, where: str, bad: float):
    blocks = some_blocks(MixKVQConfig.parse(text))
    pages, chunks = blocks.pack()
    getattr(blocks.step, where)[0, 0, 7, 3] = bad
    bad_pages, bad_chunks = blocks.pack()
    for block in (0, 2):
        page = blocks.pages[block]
        assert torch.equal(pages[page], bad_pages[page])
        for bits, pool in chunks.items():
            start, count = blocks.store.chunks[bits].runs[page]
            assert torch.equal(pool[start : start + count], bad_chunks[bits][start : start + count])
    if bad != bad:
        content = blocks.content(bad_pages, bad_chunks)[0][where == "values"]
        assert content[0, 7].isnan().any()  # it is not hidden either


@pytest.mark.parametrize("text", ["default", "kivi-2", "kivi-2:key_clip=true,value_clip=true,value_unbiased=true"])
def test_constant_channels_come_back_exactly(text: str):
    blocks = some_blocks(MixKVQConfig.parse(text))
    blocks.step.keys[..., 3] = 1.75
    blocks.step.values[...] = -0.5
    blocks = Blocks.of(blocks.config, blocks.step, blocks.rows, blocks.starts)
    for keys, values in blocks.content(*blocks.pack()).values():
        assert (keys[..., 3] == 1.75).all()
        if not blocks.rotated:
            assert (values == -0.5).all()


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e3, 1e5])
@pytest.mark.parametrize("text", ["default", "kivi-2:scale_dtype=bfloat16", THRESHOLDS])
def test_extreme_scales(text: str, scale: float):
    blocks = some_blocks(MixKVQConfig.parse(text))
    step = blocks.step
    step = Step(step.query, step.keys * scale, step.values * scale)
    Blocks.of(blocks.config, step, blocks.rows, blocks.starts).check()


def test_it_refuses_what_it_cannot_read():
    blocks = some_blocks(MixKVQConfig.parse("kivi-2:residual_length=48,key_group=16"))
    with pytest.raises(ValueError, match="power of two, not 48 tokens"):
        blocks.pack()
    blocks = some_blocks(MixKVQConfig.parse("kivi-2"))
    with pytest.raises(ValueError, match="last dimension contiguous"):
        blocks.pack(blocks.step.keys.transpose(2, 3).contiguous().transpose(2, 3))


# Plan


def planned(config: MixKVQConfig, keys: Tensor, statistics: QueryStatistics, rows: list[int], starts: list[int]):
    """The kernel's widths and the policy's."""
    policy = policy_class(config.policy)(config)
    layout = layer_cache(config, Step(keys, keys, keys)).store.layout
    bits = plan_blocks(
        keys.to(DEVICE),
        integers(rows),
        integers(starts),
        torch.ones(len(rows), dtype=torch.bool, device=DEVICE),
        statistics.total.to(DEVICE),
        statistics.count.to(DEVICE),
        policy.rule,
        layout,
    )
    blocks = torch.stack([keys[row, :, start : start + layout.tokens] for row, start in zip(rows, starts, strict=True)])
    importance = statistics.rows(torch.tensor(rows)).importance() if policy.uses_queries else None
    return bits.cpu(), policy.plan(KeyBlock(blocks, importance))


def random_statistics(batch: int, kv_heads: int, dim: int) -> QueryStatistics:
    """Sums of queries; the first row has seen none."""
    statistics = QueryStatistics(batch, kv_heads, dim, torch.device("cpu"))
    statistics.total += torch.rand(batch, kv_heads, dim) * 100
    statistics.count += torch.arange(batch) * 7.0
    return statistics


@pytest.mark.parametrize("text", [*WITH_RULES, "paper-r1-qwen-14b", "default:salience=error", "default:budget=2.0"])
@pytest.mark.parametrize("shape", [(2, 16), (3, 24), (1, 5), (8, 64)])
def test_plans_are_the_policy_s(text: str, shape: tuple[int, int]):
    config, (kv_heads, dim) = MixKVQConfig.parse(text), shape
    size = config.residual_length
    keys = random_step(3, 2 * size + 5, heads=kv_heads, kv_heads=kv_heads, dim=dim).keys
    bits, expected = planned(config, keys, random_statistics(3, kv_heads, dim), [2, 0, 1, 2], [5, 0, 3, size + 5])
    assert torch.equal(bits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["default", "kitty", THRESHOLDS])
def test_plans_of_other_types(text: str, dtype: torch.dtype):
    keys = random_step(2, 140, dtype=dtype).keys
    bits, expected = planned(MixKVQConfig.parse(text), keys, random_statistics(2, 2, 16), [1, 0], [12, 0])
    # Kitty's score is a mean in the keys' own type, where single additions may round otherwise.
    assert (bits != expected).float().mean() <= (0.1 if text == "kitty" else 0)
    assert torch.equal((bits == 4).sum((1, 2)), (expected == 4).sum((1, 2)))


@pytest.mark.parametrize(("text", "ranking"), [("default", (1, 48)), ("default:budget_scope=head", (3, 16))])
def test_equal_scores_go_by_number(text: str, ranking: tuple[int, int]):
    config = MixKVQConfig.parse(text)
    keys = torch.zeros(1, 3, 128, 16)
    bits, expected = planned(config, keys, random_statistics(1, 3, 16), [0], [0])
    count = int((expected == 4).sum()) // ranking[0]
    by_number = bits.view(*ranking)
    assert (by_number[:, :count] == 4).all()
    assert (by_number[:, count:] == 2).all()


@pytest.mark.parametrize("text", ["default", "kitty"])
def test_a_budget_holds_whatever_the_keys_are(text: str):
    keys = random_step(1, 128, kv_heads=2).keys
    keys[0, 0, 5, :7] = torch.nan
    keys[0, 1, 5, :3] = torch.inf
    bits, expected = planned(MixKVQConfig.parse(text), keys, random_statistics(1, 2, 16), [0], [0])
    assert (bits == 4).sum() == (expected == 4).sum()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_inactive_blocks_are_left_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    config = MixKVQConfig.preset("default")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(99))
    step = random_step(2, 128)
    total, count = (x.to(DEVICE) for x in random_statistics(2, 2, 16).tensors())
    active = torch.tensor([0, 1], dtype=dtype, device=DEVICE)
    policy, layout = policy_class("mixkvq")(config), layer_cache(config, step).store.layout
    bits = plan_blocks(
        step.keys.to(DEVICE), integers([0, 1]), integers([0, 0]), active, total, count, policy.rule, layout
    )
    assert (bits[0] == 99).all()
    assert set(bits[1].unique().tolist()) == {2, 4}


def test_a_salience_needs_statistics():
    config, step = MixKVQConfig.preset("default"), random_step(1, 128)
    rule, layout = MixKVQ(config).rule, layer_cache(config, step).store.layout
    with pytest.raises(ValueError, match="needs the query statistics"):
        plan_blocks(step.keys, integers([0]), integers([0]), integers([1]), None, None, rule, layout)


# Rules


def test_a_rule_is_the_policy_s_own():
    class Mine(Policy):
        def plan(self, block: KeyBlock) -> Tensor:
            return torch.empty(0)

    class MyKIVI(KIVI):
        def plan(self, block: KeyBlock) -> Tensor:
            return super().plan(block)

    class MyScore(MixKVQ):
        def score(self, block: KeyBlock) -> Tensor:
            return block.keys.sum(2)

    class Named(MixKVQ):
        name = "named"

    config = MixKVQConfig.preset("default")
    assert [policy(config).rule for policy in (Mine, MyKIVI, MyScore)] == [None] * 3
    assert Named(config).rule == MixKVQ(config).rule == PlanRule("salience", budget=2.84, scope="layer")


def test_a_rule_counts_what_the_policy_promotes(static_config: MixKVQConfig):
    policy = policy_class(static_config.policy)(static_config)
    promoted = policy.promoted_channels(3, 24)
    if promoted is not None:
        rankings = 3 if policy.rule.scope == "head" else 1
        assert policy.rule.count(3, 24, static_config.key_bits) * rankings == sum(promoted.values())
