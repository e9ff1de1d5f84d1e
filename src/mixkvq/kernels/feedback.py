"""Error feedback on a GPU: the one entrance to the kernels that move keys before they are packed."""

from __future__ import annotations

from torch import Tensor

from mixkvq.store.layout import PageLayout


def move_keys(
    keys: Tensor,
    rows: Tensor,
    starts: Tensor,
    active: Tensor,
    bits: Tensor,
    samples: Tensor,
    layout: PageLayout,
    *,
    damping: float,
    key_clip: bool,
    key_unbiased: bool,
) -> None:
    """Replace the keys of N blocks by those that :func:`~mixkvq.quant.feedback.quantize_with_feedback` rounds.

    Does not wait for the device.

    Args:
        keys: ``[X, Hkv, T, D]`` float32, float16 or bfloat16, changed in place.
        rows, starts: ``[N]`` int32, each block's row of ``keys`` and its first token.
        active: ``[N]`` int32, 0 leaves a block alone.
        bits: ``[N, Hkv, D]`` uint8, planned widths.
        samples: ``[X, Hkv, S, D]``, the rows' sampled queries.
        damping, key_clip, key_unbiased: as in :class:`~mixkvq.config.MixKVQConfig`.

    Raises:
        ValueError: ``layout.tokens`` is no power of two.
    """
    from mixkvq.kernels.cuda import feedback as cuda

    if cuda.unsupported(keys, samples, layout) is None:
        move = cuda.move_keys
    else:
        from mixkvq.kernels.triton.feedback import move_keys as move
    move(
        keys,
        rows,
        starts,
        active,
        bits,
        samples,
        layout,
        damping=damping,
        key_clip=key_clip,
        key_unbiased=key_unbiased,
    )
