"""Device functions that turn words of a page into operands of matrix products.

Codes are operands by tiles of 16 tokens. In BF16, a code below 128 becomes ``BIAS + code`` by setting bits: 0x4300 is
128 and its lowest mantissa bit counts one. Whoever uses the product subtracts ``BIAS`` times the sum of the other
operand, as it was rounded, which is exact up to float32 accumulation.
"""

# Triton compiles what follows a return, and knows no starred tuples.
# ruff: noqa: RET505, SIM300
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixkvq.kernels.triton.read_format import ReadPlanes

#: Whether kernels run in Triton's interpreter on the CPU. It must be decided before this module is imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
#: Whether kernels may hold instructions of NVIDIA's.
HAS_PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)


@triton.constexpr_function
def code_bias(planes: ReadPlanes, dtype: tl.dtype) -> int:
    """What :func:`operand` adds to every code of these planes, in a product of the given type."""
    return 128 if dtype == tl.bfloat16 and planes.bits < 8 else 0


@triton.constexpr_function
def bias_bits(bias: int, plane: int, planes: int) -> int:
    """Bits that make a code a BF16 number of its value and a bias more: they are set with the last plane."""
    return 0x4300 if bias and plane == planes - 1 else 0


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in another type; for the interpreter, BF16 numbers as float32."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # Its own conversion halves numbers that round up to a power of two.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif HAS_PTX and DTYPE == tl.bfloat16 and x.dtype == tl.float32:
        # Two numbers an instruction; the compiler takes one, and a slow one, where it loses sight of pairs.
        PTX: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(PTX, "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return x.to(DTYPE)


@triton.jit
def product(a, b, added=None):
    """``a [M, K] . b [K, N] + added`` in float32: inputs of 16 bits go through tensor cores, float32 is not rounded."""
    if INTERPRETED:
        # The interpreter keeps BF16 as bare bits and would multiply those.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), added, input_precision="ieee")
    else:
        return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def operand(codes, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes ``[M, K]`` int16, to which :func:`push_bits` has put the bits of a BIAS, as a matrix operand."""
    if BIAS:
        return codes.to(tl.bfloat16, bitcast=True)
    else:
        return codes.to(tl.float32).to(DTYPE)


@triton.jit
def load_where(pointer, inside, ALL: tl.constexpr):
    """A load that is 0 outside; ALL says that nothing is."""
    if ALL:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=inside, other=0)


@triton.jit
def word_numbers(START: tl.constexpr, WORDS: tl.constexpr):
    """Which words of a plane of so many hold 16 tokens from START: ``[16]``."""
    if START % WORDS + 16 <= WORDS:
        return START % WORDS + tl.arange(0, 16)
    else:
        return (START % WORDS + tl.arange(0, 16)) % WORDS


@triton.constexpr_function
def push_two(shift: int, width: int, above: int) -> str:
    """PTX for :func:`push_bits` on two words at once, of which ``shift`` bits are skipped."""
    mask = (1 << width) - 1
    return (
        "{ .reg .b32 high, low;"
        f"shl.b32 high, $1, {width}; shr.u32 low, $2, {shift};"
        f"lop3.b32 low, low, {mask << 16 | mask}, {above << 16 | above}, 0xEA;"  # low & mask | above
        "or.b32 $0, high, low; }"
    )


@triton.jit
def push_bits(
    codes,
    words,
    START: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    AXIS: tl.constexpr,
    ABOVE: tl.constexpr,
):
    """Codes of 16 tokens from START, which lie along AXIS, with the WIDTH bits put below them that their words hold.

    The bits of ABOVE are set too.
    """
    if START % WORDS + 16 <= WORDS and HAS_PTX:
        PTX: tl.constexpr = push_two(START // WORDS * WIDTH, WIDTH, ABOVE)
        return tl.inline_asm_elementwise(PTX, "=r,r,r", [codes, words], dtype=tl.int16, is_pure=True, pack=2)
    else:
        position = START // WORDS + (START % WORDS + tl.arange(0, 16)) // WORDS
        shift = tl.expand_dims((position * WIDTH).to(tl.int16), 1 - AXIS)
        return (codes << WIDTH) | ((words >> shift) & ((1 << WIDTH) - 1)) | ABOVE


@triton.jit
def key_codes(page, head, START: tl.constexpr, F: tl.constexpr, CHANNELS: tl.constexpr, BIAS: tl.constexpr):
    """Base codes of 16 tokens of one head: ``[16, CHANNELS]`` int16; past ``F.key_dim`` anything."""
    PLANES: tl.constexpr = F.key_planes
    COUNT: tl.constexpr = PLANES.count
    channel = tl.arange(0, CHANNELS)[None, :]
    codes = tl.zeros((16, CHANNELS), tl.int16)
    for i in tl.static_range(COUNT):
        word = word_numbers(START, PLANES.words[i])
        plane = (page + PLANES.offsets[i]).to(tl.pointer_type(tl.int16)) + head * (PLANES.words[i] * F.key_dim)
        words = load_where(plane + word[:, None] * F.key_dim + channel, channel < F.key_dim, CHANNELS == F.key_dim)
        codes = push_bits(codes, words, START, PLANES.words[i], PLANES.widths[i], 0, bias_bits(BIAS, i, COUNT))
    return codes


@triton.jit
def value_codes(page, head, first, START: tl.constexpr, F: tl.constexpr, CHANNELS: tl.constexpr, BIAS: tl.constexpr):
    """Codes of 16 tokens of the value group that begins at channel ``first``: ``[CHANNELS, 16]`` int16."""
    PLANES: tl.constexpr = F.value_planes
    COUNT: tl.constexpr = PLANES.count
    channel = tl.arange(0, CHANNELS)[:, None]
    codes = tl.zeros((CHANNELS, 16), tl.int16)
    for i in tl.static_range(COUNT):
        word = word_numbers(START, PLANES.words[i])
        plane = (page + PLANES.offsets[i]).to(tl.pointer_type(tl.int16))
        plane += (head * F.value_dim + first) * PLANES.words[i]
        inside = channel < F.value_group_dim
        words = load_where(plane + channel * PLANES.words[i] + word[None, :], inside, CHANNELS == F.value_group_dim)
        codes = push_bits(codes, words, START, PLANES.words[i], PLANES.widths[i], 1, bias_bits(BIAS, i, COUNT))
    return codes


@triton.jit
def lane_codes(chunk, START: tl.constexpr, TIER: tl.constexpr, BIAS: tl.constexpr):
    """Extra codes of 16 tokens in all lanes of a chunk: ``[16, lanes]`` int16."""
    PLANES: tl.constexpr = TIER.planes
    LANES: tl.constexpr = TIER.lanes
    COUNT: tl.constexpr = PLANES.count
    lane = tl.arange(0, LANES)[None, :]
    codes = tl.zeros((16, LANES), tl.int16)
    for i in tl.static_range(COUNT):
        word = word_numbers(START, PLANES.words[i])
        plane = (chunk + PLANES.offsets[i]).to(tl.pointer_type(tl.int16))
        words = tl.load(plane + word[:, None] * LANES + lane)
        codes = push_bits(codes, words, START, PLANES.words[i], PLANES.widths[i], 0, bias_bits(BIAS, i, COUNT))
    return codes
