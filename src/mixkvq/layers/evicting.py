"""The cache of one layer that evicts tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.kernels.mass import attention_mass, weighed_attention
from mixkvq.kernels.partial import causal
from mixkvq.layers.step import Step
from mixkvq.layers.surroundings import ordinary_tensors
from mixkvq.policies.evicting import EvictingPolicy, held_after, moving_average
from mixkvq.quant.block import DENSE_BITS
from mixkvq.store import MemoryReport
from mixkvq.store.evicting import EvictingStore, HeldTokens

#: Queries of a long prompt that count for the attention mass; what is left of an older one is below 1e-11.
WEIGHED = 256


@dataclass(frozen=True)
class _Row:
    """One sequence's share of a step: real tokens alone.

    Attributes:
        real: which of the step's tokens these are; None if all.
        query: ``[Hq, L, D]``.
        keys, values: ``[Hkv, L, D]``.
        visible: ``[L, T]`` bool, over the tokens held and the new ones.
    """

    real: Tensor | None
    query: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor


class EvictingCache:
    """Keys and values of one attention layer, of which a limited number of tokens is kept, and attention over them.

    The sibling of :class:`~mixkvq.layers.LayerCache`, in plain torch on any device, sequence by sequence. Keys keep
    the rotary position that they came with. After every step each sequence is cut to its budget for a model that is
    not confident; :meth:`observe` tells how confident it was, and may cut further.

    Args:
        config: how tokens are stored.
        policy: which are kept; shared by the layers.
        like: the first step, for shapes, type and device.
    """

    @ordinary_tensors
    def __init__(self, config: MixKVQConfig, policy: EvictingPolicy, like: Step) -> None:
        if config.layers:
            raise ConfigError("This takes the settings of one layer, and the configuration has settings by layer.")
        self.config = config
        self.policy = policy
        batch, kv_heads, _, key_dim = like.keys.shape
        self.store = EvictingStore(
            batch,
            kv_heads,
            key_dim,
            like.values.shape[3],
            dtype=like.keys.dtype,
            param_dtype=config.param_dtype,
            mass=policy.uses_mass,
            device=like.keys.device,
        )
        #: Attention mass of all tokens and a step's new ones, from its attention until it is appended.
        self._weighed: list[Tensor] | None = None
        #: Tokens held of each sequence before the last step, and its new ones.
        self._before, self._new = [0] * batch, [0] * batch

    @ordinary_tensors
    def attend(self, step: Step, visible: Tensor | None, **options: Any) -> Tensor:
        """Attention of new tokens over everything held and over themselves; see :meth:`LayerCache.attend`."""
        batch, heads, length, _ = step.query.shape
        output = step.query.new_zeros(batch, heads, length, step.values.shape[3])
        masses = []
        for row, (held, new) in enumerate(self._rows(step, visible)):
            keys, values = _joined(held, new)
            shares = moving_average(new.query.shape[1], self.policy.mass_decay, keys.device)
            found, mass = weighed_attention(new.query, keys, values, new.visible, shares, **options)
            output[row, :, slice(None) if new.real is None else new.real] = found.to(output.dtype)
            masses.append(self._average(held, mass, len(shares)))
        self._weighed = masses
        return output

    @ordinary_tensors
    def weigh(self, step: Step, visible: Tensor | None, **options: Any) -> None:
        """Gather the attention mass of a step whose attention was computed elsewhere; arguments as :meth:`attend`."""
        if not self.policy.uses_mass:
            return
        masses = []
        for held, new in self._rows(step, visible):
            keys, _ = _joined(held, new)
            count = new.query.shape[1]
            part = slice(max(0, count - WEIGHED), count)
            shares = moving_average(count, self.policy.mass_decay, keys.device)
            mass = attention_mass(new.query[:, part], keys, new.visible[part], shares[part], **options)
            masses.append(self._average(held, mass, count))
        self._weighed = masses

    @ordinary_tensors
    def append(self, step: Step) -> None:
        """Store new tokens, after their attention, and cut every sequence to its budget."""
        masses = self._weighed
        if masses is None and self.policy.uses_mass:
            raise RuntimeError("Tokens are appended after their attention: call attend() or weigh() first.")
        self._weighed = None
        self._before = self.store.lengths
        for row in range(self.store.batch):
            keys, values = step.keys[row], step.values[row]
            if step.real is not None:
                keys, values = keys[:, step.real[row]], values[:, step.real[row]]
            mass = masses[row] if masses is not None and self.policy.uses_mass else None
            self._new[row] = keys.shape[1]
            self._keep(row, self.store.rows[row].extend(keys, values, mass), self.policy.budget(None))

    @ordinary_tensors
    def observe(self, confidences: Sequence[Sequence[float]]) -> None:
        """Cut every sequence to what the model's confidence leaves it.

        Args:
            confidences: of each sequence, one for each of its tokens of the last step: as many are held afterwards as
                if these had come one by one. With fewer it was a prompt, which is cut to the budget without confidence.
        """
        for row, given in enumerate(confidences):
            if len(given) == self._new[row]:
                budgets = [self.policy.budget(confidence) for confidence in given]
                self._keep(row, self.store.rows[row], held_after(self._before[row], budgets))

    def _keep(self, row: int, held: HeldTokens, count: int) -> None:
        if held.length > count:
            held = held.select(self.policy.survivors(held.steps, held.mass, held.seen, count))
        if self.config.key_bits != DENSE_BITS:
            held = held.pack(self.config.sinks, self.config.residual_length, self.config.key_group)
        self.store.rows[row] = held

    def _rows(self, step: Step, visible: Tensor | None) -> Iterator[tuple[HeldTokens, _Row]]:
        """What is held of each sequence, and what is new."""
        for row, held in enumerate(self.store.rows):
            real = None if step.real is None else step.real[row]
            tensors = step.query[row], step.keys[row], step.values[row]
            if real is not None:
                tensors = tensors[0][:, real], tensors[1][:, real], tensors[2][:, real]
            count = tensors[1].shape[1]
            among = causal(count, count, step.keys.device)
            if visible is not None:
                among = visible[row if visible.shape[0] > 1 else 0]
                among = among if real is None else among[real][:, real]
            yield held, _Row(real, *tensors, torch.cat([among.new_ones(count, held.length), among], 1))

    def _average(self, held: HeldTokens, mass: Tensor, count: int) -> Tensor:
        """The moving average after ``count`` new tokens, whose attention came to ``mass``."""
        if held.mass is not None:
            mass[: held.length] += held.mass * self.policy.mass_decay**count
        return mass

    @ordinary_tensors
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given batch rows, in that order, repeats allowed."""
        self.store.select(rows)
        self._before, self._new = ([old[row] for row in rows] for old in (self._before, self._new))

    @ordinary_tensors
    def crop(self, removed: Sequence[int]) -> None:
        """Remove the last ``removed[b]`` tokens of every sequence; the attention that they gave stays counted.

        Raises:
            NotImplementedError: as :meth:`check_crop`.
        """
        self.check_crop([row for row, count in enumerate(removed) if count])
        for row, count in enumerate(removed):
            if count:
                self.store.rows[row] = self.store.rows[row].without_last(count)

    def check_crop(self, rows: Iterable[int]) -> None:
        """Refuse to make sequences shorter of which tokens were evicted: shorter they would have others.

        Raises:
            NotImplementedError: there is one.
        """
        for row in rows:
            held = self.store.rows[row]
            if held.seen > held.length:
                raise NotImplementedError(
                    f"crop: {held.seen - held.length} of the {held.seen} tokens of sequence {row} were evicted and do "
                    "not come back, so it cannot be made shorter. Begin anew with reset(), or use a cache that keeps "
                    "all tokens, such as 'default'."
                )

    def memory(self) -> MemoryReport:
        """Bytes held, by part."""
        return self.store.memory()


def _joined(held: HeldTokens, new: _Row) -> tuple[Tensor, Tensor]:
    """Keys and values ``[Hkv, T, D]`` of what is held and what is new."""
    keys, values = held.dequantize()
    return torch.cat([keys, new.keys.to(keys.dtype)], 1), torch.cat([values, new.values.to(values.dtype)], 1)
