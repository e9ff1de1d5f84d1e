"""Query-aware error feedback: later channels make up for what rounding the earlier ones did to the logits.

What matters is not a key's error but a logit's, ``(k - k~) . q``, whose mean square is ``(k - k~)^T H (k - k~)`` with
``H = E[q q^T]``. Channels are rounded one after the other, the most salient first, and each is moved beforehand by what
the errors so far ask of it. With ``H = U D U^T``, ``U`` unit upper triangular::

    k~_i = Q(k_i + sum over j < i of (k_j - k~_j) U_ji)

Channels of large heads are cut into parts of up to 128, so that a matrix fits where it is worked on: channel ``d`` of
a head in P parts belongs to part ``d mod P``, and its errors travel within that.

This is LDLQ (QuIP, arXiv 2307.13304), which gives what GPTQ (2210.17323) gives, with keys in place of weights and
queries in place of activations. The format does not change; only what is written does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixkvq.quant.affine import Affine, dequantize, quantize
from mixkvq.quant.salience import sensitivity

#: Channels that a part of a head has at most.
PART_CHANNELS = 128


def feedback_parts(head_dim: int) -> int:
    """Parts that the channels of a head are cut into."""
    return -(-head_dim // PART_CHANNELS)


class Feedback(NamedTuple):
    """How errors travel from channel to channel, for N blocks.

    Attributes:
        order: ``[N, Hkv, D]`` int64, the channels in the order of rounding.
        weights: ``[N, Hkv, D, D]`` float32, unit upper triangular in that order: ``weights[j, i]`` is the share of
            channel ``j``'s error that channel ``i`` makes up for.
    """

    order: Tensor
    weights: Tensor

    @classmethod
    def of(cls, covariance: Tensor, salience: Tensor, damping: float) -> Feedback:
        """From ``H [N, Hkv, D, D]``, in the order of falling ``salience [N, Hkv, D]``.

        ``damping`` times a part's mean diagonal is added to the diagonal of H there. A covariance of no queries at
        all, which is zero, leads to no feedback, and so does one that is not finite: a bad query must not spoil all
        keys after it.
        """
        order = salience.argsort(dim=-1, descending=True, stable=True)
        count = order.shape[-1]
        part = torch.arange(count, device=order.device) % feedback_parts(count)
        together = part[:, None] == part
        diagonal = covariance.float().diagonal(dim1=-2, dim2=-1)
        # Not a product: what is not finite in one part must not reach another.
        power = torch.where(together, diagonal[..., None], 0).sum(-2) / together.sum(0)
        power = power[..., None].expand_as(covariance)
        identity = torch.eye(count, dtype=torch.float32, device=order.device)
        usable = (power > 0) & power.isfinite()
        damped = torch.where(usable & together, covariance / power, 0) + damping * identity
        damped = torch.where(usable, damped, identity)
        sorted_rows = damped.gather(2, order[..., None].expand(-1, -1, -1, count))
        damped = sorted_rows.gather(3, order[:, :, None, :].expand(-1, -1, count, -1))
        # The factor of the reversed matrix, reversed, is upper triangular.
        upper = torch.linalg.cholesky(damped.flip(-1, -2)).flip(-1, -2)
        return cls(order, upper / upper.diagonal(dim1=-2, dim2=-1)[..., None, :])


def quantize_with_feedback(
    grouped: Tensor,
    bits: Tensor,
    exact: Tensor,
    feedback: Feedback,
    *,
    clip: bool,
    unbiased: bool,
    param_dtype: torch.dtype,
) -> Affine:
    """:func:`~mixkvq.quant.affine.quantize`, channel by channel.

    Args:
        grouped: ``[N, Hkv, D, R / G, G]`` keys.
        bits: ``[N, Hkv, D]``, widths of 1 to 8.
        exact: ``[N, Hkv, D]`` bool, channels that are stored as they are: they have no error to make up for.
        feedback: see there.

    Returns:
        codes ``[N, Hkv, D, R / G, G]``, scale and zero ``[N, Hkv, D, R / G, 1]``, in the channels' own order.
    """
    keys = _ordered(grouped.float(), feedback.order)
    widths = _ordered(bits, feedback.order)
    errors = torch.zeros_like(keys)
    exact = _ordered(exact, feedback.order)
    rounded: list[Affine] = []
    for i in range(keys.shape[2]):
        key = keys[:, :, i]
        moved = key
        if i:
            share = feedback.weights[:, :, None, :i, i]
            moved = key + (share @ errors[:, :, :i].flatten(3)).view_as(key)
        moved = moved.to(grouped.dtype)  # what a kernel has room for
        q = quantize(moved, widths[:, :, i, None, None], clip=clip, unbiased=unbiased, param_dtype=param_dtype)
        errors[:, :, i] = (key - dequantize(*q)).masked_fill(exact[:, :, i, None, None], 0)
        rounded.append(q)
    back = feedback.order.argsort(-1)
    return Affine(*(_ordered(torch.stack(parts, 2), back) for parts in zip(*rounded, strict=True)))


def rounding_order(keys: Tensor, covariance: Tensor, exact: Tensor, *, group: int, bits: int) -> Tensor:
    """``[N, Hkv, D]``: the salience by which channels are ordered, from mean squared queries and the keys' steps.

    Channels that are stored as they are (``exact``) come first: they cannot make up for anything.
    """
    power = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    return (power.sqrt() * sensitivity(keys, group, bits)).masked_fill(exact, torch.inf)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """``x [N, Hkv, D, ...]`` with its channels in another order."""
    return x.gather(2, order.view(*order.shape, *[1] * (x.dim() - 3)).expand_as(x))
