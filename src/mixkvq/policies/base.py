"""The protocol between the cache and whoever decides the bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

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


class Policy(ABC):
    """Decides how many bits each key channel of a block gets.

    A policy holds no state of a sequence: it is shared by all layers, and may be called with the blocks of several
    sequences at once.

    Attributes:
        name: in the registry, and in ``MixKVQConfig.policy``.
        presets: the named configurations that this policy brings.
        uses_queries: whether :attr:`KeyBlock.importance` is gathered.
    """

    name: ClassVar[str]
    presets: ClassVar[dict[str, Preset]]
    uses_queries: bool = False

    def __init__(self, config: MixKVQConfig) -> None:
        self.config = config

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        """Refuse what this policy cannot carry out, with a ``ConfigError``."""

    @property
    def promoted_bits(self) -> tuple[int, ...]:
        """Widths above ``key_bits`` that :meth:`plan` may hand out, rising."""
        return ()

    def promoted_channels(self, kv_heads: int, head_dim: int) -> dict[int, int] | None:
        """How many channels of a page each promoted width gets, all heads together; None where data decides."""
        return {}

    @abstractmethod
    def plan(self, block: KeyBlock) -> Tensor:
        """Each channel's width: ``[N, Hkv, D]`` uint8, of ``key_bits`` and :attr:`promoted_bits`."""
