"""The protocol between the cache and whoever decides the bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from mixkvq.policies.tiers import Scope, promoted_count

if TYPE_CHECKING:
    from mixkvq.config import MixKVQConfig, Preset


@dataclass(frozen=True)
class KeyBlock:
    """What a policy sees of N blocks of keys that are about to be quantized.

    Attributes:
        keys: ``[N, Hkv, R, D]``, after RoPE.
        importance: ``[N, Hkv, D]``, mean ``|q|`` of the block's sequence so far; None unless the policy asks for it.
    """

    keys: Tensor
    importance: Tensor | None


@dataclass(frozen=True)
class PlanRule:
    """What a policy's plan comes to, declared so that a kernel can carry it out.

    Attributes:
        score: what channels are ranked by: "error" is the sensitivity ``S_d``, "salience" is ``I_d * S_d``,
            "magnitude" the mean ``|K|`` in the keys' own type; "none": no channel is promoted.
        budget, scope: promote from the top, as :func:`~mixkvq.policies.tiers.promote_top`.
        thresholds: promote above thresholds, as :func:`~mixkvq.policies.tiers.promote_above`, instead of a budget.
    """

    score: Literal["none", "error", "salience", "magnitude"]
    budget: float | None = None
    scope: Scope = "layer"
    thresholds: dict[int, float] | None = None

    def count(self, kv_heads: int, head_dim: int, base_bits: int) -> int:
        """Promoted channels of each ranking: one of all heads with the scope "layer", else one per head."""
        if self.budget is None:
            return 0
        rankings = 1 if self.scope == "layer" else kv_heads
        return promoted_count(kv_heads, head_dim, base_bits, self.budget, self.scope) // rankings


class Policy(ABC):
    """Decides how many bits each key channel of a block gets.

    A policy holds no state of a sequence: it is shared by all layers, and may be called with the blocks of several
    sequences at once.

    Attributes:
        name: in the registry, and in ``MixKVQConfig.policy``.
        presets: the named configurations that this policy brings.
        fields: fields of the configuration that mean something to it and not to every policy.
        uses_queries: whether :attr:`KeyBlock.importance` is gathered.
        narrows: whether stored codes lose bits as the context grows, for which a cache of its own is used.
        uses_confidence: whether caches ask for the model's confidence after each step.
        evicts: whether it is an :class:`~mixkvq.policies.evicting.EvictingPolicy`, whose caches do not keep all tokens.
    """

    name: ClassVar[str]
    presets: ClassVar[dict[str, Preset]]
    fields: ClassVar[frozenset[str]] = frozenset()
    evicts: ClassVar[bool] = False
    uses_queries: bool = False
    narrows: ClassVar[bool] = False
    uses_confidence: bool = False

    def __init__(self, config: MixKVQConfig) -> None:
        self.config = config

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        """Refuse what this policy cannot carry out, with a ``ConfigError``."""

    @classmethod
    def for_layer(cls, config: MixKVQConfig, index: int, count: int) -> MixKVQConfig:
        """What layer ``index`` of ``count`` stores by, where the policy itself treats layers differently."""
        return config

    @property
    def promoted_bits(self) -> tuple[int, ...]:
        """Widths above ``key_bits`` that :meth:`plan` may hand out, rising."""
        return ()

    def promoted_channels(self, kv_heads: int, head_dim: int) -> dict[int, int] | None:
        """How many channels of a page each promoted width gets, all heads together; None where data decides."""
        return {}

    @property
    def recent(self) -> float:
        """Share of the context that a layer keeps in the model's type as its newest tokens; such caches are growing
        ones, and read by torch operations.
        """
        return 0.0

    @property
    def rule(self) -> PlanRule | None:
        """The same as :meth:`plan` for kernels that plan on the device; None: there is only :meth:`plan`."""
        return None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if vars(cls).keys() & {"plan", "score"} and "rule" not in vars(cls):
            cls.rule = Policy.rule  # type: ignore[method-assign]  # the parent's rule would contradict the new plan

    @abstractmethod
    def plan(self, block: KeyBlock) -> Tensor:
        """Each channel's width: ``[N, Hkv, D]`` uint8, of ``key_bits`` and :attr:`promoted_bits`."""
