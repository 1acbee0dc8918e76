"""Operations that Triton's interpreter does otherwise than a GPU, and that every kernel therefore takes from here: two that it
gets wrong for bf16, and a sum that it rounds more often.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a . b`` with fp32 accumulation. (The interpreter multiplies bf16 operands' bit patterns, Triton 3.6 to 3.9.)"""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """fp32 to ``DTYPE``, to nearest even. (The interpreter cuts the low bits off on the way to bf16, Triton 3.6 to 3.8.)"""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits &= -0x10000  # what is left of a zero would be cut to something else than zero
        # The sum would carry a NaN into another number.
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def column_sums(values):
    """Sums [K] of ``values`` [M, K] over M.

    A GPU adds the few numbers of a thread, and then the threads' sums in a tree. The interpreter adds row to row: in a tile of
    512 pixels a variance was 5 roundings off, where it is less than one here.
    """
    if INTERPRETED:
        while values.shape[0] > 8:
            values = tl.sum(tl.reshape(values, (8, values.shape[0] // 8, values.shape[1])), axis=0)
    return tl.sum(values, axis=0)
