"""Device functions for softmax over logits in units of ``log 2``, as they come: a running maximum and what is left."""

# Triton compiles what follows a return, and knows no starred tuples.
# ruff: noqa: RET505
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(logits, cap, SOFTCAP: tl.constexpr):
    """Logits in units of ``log 2``: unchanged, or ``cap * tanh(logits)`` in natural units with SOFTCAP.

    The logits' factor (:func:`logit_factor`) has turned them into those units, or divided them by the cap.
    """
    if SOFTCAP:
        # tanh by one exponential, which may be infinite.
        return (1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 * LOG2_E)))) * (cap * LOG2_E)
    else:
        return logits


@triton.jit
def logit_factor(scaling, cap, SOFTCAP: tl.constexpr):
    """What queries are multiplied by before :func:`capped`."""
    if SOFTCAP:
        return scaling / cap
    else:
        return scaling * LOG2_E


@triton.jit
def new_maximum(top, scores):
    """The larger of ``top [rows]`` and the maximum of a tuple of tiles ``[16, rows]``."""
    TILES: tl.constexpr = len(scores)
    most = scores[0]
    for i in tl.static_range(1, TILES):
        most = tl.maximum(most, scores[i])
    return tl.maximum(top, tl.max(most, 0))
