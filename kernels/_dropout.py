"""Dropout without a stored mask: what nf4/reference/dropout_mask.py keeps, tile by tile."""

import triton
import triton.language as tl


@triton.jit
def _half(words, i: tl.constexpr):
    return (words >> (16 * i)) & 0xFFFF


@triton.jit
def keep(seed_ptr, rows, columns, row_length, threshold):
    """Return which elements dropout keeps, bool ``[len(rows), 8 * len(columns)]``.

    Args:
        seed_ptr: int64 [], the key of Philox-4x32-10.
        rows: int64 [m], of a matrix whose elements are numbered row by row.
        columns: int32 [n], every eighth column, each a multiple of eight.
        row_length: columns of the matrix, a multiple of eight.
        threshold: the least of 16 bits that is kept.
    """
    counter = rows[:, None] * (row_length // 8) + (columns // 8)[None, :]
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), counter)
    # Element 4 a + 2 b + c of eight is half c of word 2 a + b: joined from a to c, flattened.
    low = tl.join(tl.join(_half(w0, 0), _half(w2, 0)), tl.join(_half(w1, 0), _half(w3, 0)))
    high = tl.join(tl.join(_half(w0, 1), _half(w2, 1)), tl.join(_half(w1, 1), _half(w3, 1)))
    halves = tl.join(low, high).reshape([rows.shape[0], 8 * columns.shape[0]])
    return halves.to(tl.int32) >= threshold
