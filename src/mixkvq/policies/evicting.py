"""What policies share that keep a limited number of tokens, and evict the others for good."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.policies.kivi import KIVI
from mixkvq.quant.block import DENSE_BITS

#: Width of packed tokens; the other choice is none.
PACKED_BITS = 8
#: Fields of the configuration that the store of evicting caches has no place for.
UNSERVED = (
    "key_clip",
    "key_unbiased",
    "key_feedback",
    "value_clip",
    "value_unbiased",
    "value_symmetric",
    "value_rotation",
    "key_axis",
    "key_rotation",
    "key_rope",
    "key_levels",
    "value_levels",
    "outliers",
)


class EvictingPolicy(KIVI):
    """Keeps at most ``keep`` tokens of each sequence in a layer.

    Attributes:
        uses_mass: whether the attention that tokens get is gathered.
        mass_decay: what is left after a step of the attention mass that a token had.
    """

    fields = frozenset({"keep"})
    evicts = True
    uses_mass: bool = False
    mass_decay: float = 0.9

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        super().check(config)
        if config.keep is None:
            raise ConfigError(f"The {cls.name} policy needs keep, the tokens that a layer keeps of each sequence.")
        if config.key_bits != config.value_bits or config.key_bits not in (PACKED_BITS, DENSE_BITS):
            raise ConfigError(
                f"The {cls.name} policy stores keys and values in {PACKED_BITS} bits outside the window, or "
                f"({DENSE_BITS}) in the model's type: key_bits={config.key_bits}, value_bits={config.value_bits} were "
                "given."
            )
        for field in UNSERVED:
            if field in config.changed:
                raise ConfigError(f"The {cls.name} policy has no {field}: leave it out.")
        least = config.sinks + max(cls(config).protected, 1)
        if config.keep < least:
            raise ConfigError(
                f"keep is at least {least}, the sinks and newest tokens that the {cls.name} policy never evicts; "
                f"keep={config.keep} was given."
            )

    @property
    def protected(self) -> int:
        """How many of the newest tokens are never evicted. Nor are the sinks."""
        return 0

    def budget(self, confidence: float | None) -> int:
        """Tokens to keep of a sequence after a step.

        Args:
            confidence: of the model after that step; None where it is not known.
        """
        assert self.config.keep is not None
        return self.config.keep

    @abstractmethod
    def rank(self, steps: Tensor, mass: Tensor | None, free: Tensor) -> Tensor:
        """What tokens are kept by: ``[T]`` float32, the lowest are evicted first.

        Args:
            steps: ``[T]``, each token's number in its sequence.
            mass: ``[T]`` float32, the attention it gets; None unless :attr:`uses_mass`.
            free: ``[T]`` bool, which may be evicted; others need no meaningful rank.
        """

    def survivors(self, steps: Tensor, mass: Tensor | None, seen: int, count: int) -> Tensor:
        """Which ``count`` of T tokens stay, of a sequence with ``seen`` tokens so far: rising indices, ``[count]``.

        Of tokens of equal rank those that come first in ``steps`` go first.
        """
        free = (steps >= self.config.sinks) & (steps < seen - self.protected)
        rank = self.rank(steps, mass, free).masked_fill(~free, float("inf"))
        return rank.argsort(stable=True)[len(steps) - count :].sort().values


def held_after(held: int, budgets: list[int]) -> int:
    """Tokens that are held after some steps of one token each, evicted ones never coming back.

    Every step adds a token and then cuts to its budget: ``held <- min(held + 1, budget)``.
    """
    for budget in budgets:
        held = min(held + 1, budget)
    return held


def moving_average(count: int, decay: float, device: torch.device) -> Tensor:
    """The weights ``[count]`` of the newest ``count`` numbers in ``a <- decay * a + (1 - decay) * x``, oldest first.

    What was in ``a`` before them is left with ``decay ** count``.
    """
    age = torch.arange(count - 1, -1, -1, device=device, dtype=torch.float32)
    return (1 - decay) * decay**age
