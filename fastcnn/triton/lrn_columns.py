"""Local response normalization in Triton for short windows: a thread holds the channels that it needs as columns.

A column is one channel of some pixels. NHWC: the channels of one vector of 16 bytes or two, from their own loads and
their neighbours'. NCHW: one channel after another. Each scale and root is computed once and serves every window that
it is in.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastcnn.triton.tiles import widened


class Formula(NamedTuple):
    """A kernel's constants: the window's channels, which formula serves beta, and whether float32 is exact."""

    size: int
    kind: str
    refine: bool


class Columns(NamedTuple):
    """A kernel's constants: a thread's channels, how many such parts all make, of which a load has `vector`.

    Then whether `count` divides all, and a program's threads.
    """

    count: int
    parts: int
    vector: int
    whole: bool
    channels_last: bool
    block: int


@triton.jit
def to_columns(x, COUNT: tl.constexpr):
    """Split x: [V, COUNT] into COUNT columns [V], which costs nothing where a thread holds a row."""
    V: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, (V, COUNT // 2, 2)))
    columns = ()
    if COUNT == 2:
        columns = (tl.reshape(even, (V,)), tl.reshape(odd, (V,)))
    else:
        a, b = to_columns(even, COUNT // 2), to_columns(odd, COUNT // 2)
        for i in tl.static_range(COUNT // 2):
            columns = columns + (a[i], b[i])
    return columns


@triton.jit
def to_rows(columns, START: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Join COUNT columns [V], every STEP-th from START on, to [V, COUNT]."""
    if COUNT == 2:
        rows = tl.join(columns[START], columns[START + STEP])
    else:
        even = to_rows(columns, START, 2 * STEP, COUNT // 2)
        odd = to_rows(columns, START + STEP, 2 * STEP, COUNT // 2)
        rows = tl.reshape(tl.join(even, odd), (columns[0].shape[0], COUNT))
    return rows


@triton.jit
def load_columns(ptr, at, inside, c, C, P, BEFORE: tl.constexpr, AFTER: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a thread's channels from c on, BEFORE more before and AFTER after them: float32, zero outside the image.

    at: [V] offsets of channel c; c: [V], or one for all in NCHW.
    """
    COUNT: tl.constexpr = COLUMNS.count
    VECTOR: tl.constexpr = COLUMNS.vector
    found = ()
    if COLUMNS.channels_last:
        rows = at[:, None] + tl.arange(0, VECTOR)[None, :]
        for start in tl.static_range(-VECTOR, COUNT + VECTOR, VECTOR):
            if start + VECTOR > -BEFORE and start < COUNT + AFTER:
                there = inside
                if start < 0:
                    there = inside & (c > 0)
                elif start >= COUNT:
                    there = inside & (c + COUNT < C)
                columns = to_columns(widened(tl.load(ptr + (rows + start), mask=there[:, None], other=0.0)), VECTOR)
                for i in tl.static_range(VECTOR):
                    if start + i >= -BEFORE and start + i < COUNT + AFTER:
                        found = found + (columns[i],)
    else:
        for i in tl.static_range(-BEFORE, COUNT + AFTER):
            there = inside
            if i < 0:
                there = inside & (c + i >= 0)
            elif i >= COUNT or not COLUMNS.whole:
                there = inside & (c + i < C)
            found = found + (tl.load(ptr + (at + i * P), mask=there, other=0.0).to(tl.float32),)
    return found


@triton.jit
def window_sums(terms, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Return COUNT sums of SIZE terms in a row, the first of which starts at the first term."""
    pairs = ()
    for i in tl.static_range(COUNT + SIZE - 2):
        pairs = pairs + (terms[i] + terms[i + 1],)
    sums = ()
    for i in tl.static_range(COUNT):
        if SIZE == 1:
            total = terms[i]
        else:
            total = pairs[i]
            for j in tl.static_range(2, SIZE - 1, 2):
                total += pairs[i + j]
            if SIZE % 2 == 1:
                total += terms[i + SIZE - 1]
        sums = sums + (total,)
    return sums


@triton.jit
def power(scale, beta, NORM: tl.constexpr):
    """Return scale ** -beta and scale ** (-beta - 1).

    Kind "3/4" is beta = 0.75 without a logarithm; "0" is beta = 0, which takes the second times zero, and a scale may
    be zero.
    """
    if NORM.kind == "3/4":
        root = tl.rsqrt(scale)
        y = root * tl.sqrt(root)
        if NORM.refine:  # one step of Newton's, but where something has under- or overflown
            half = y * y * scale  # scale ** -0.5
            off = half * half * scale  # 1, but for the error
            y = tl.where(off > 0.5, y + 0.25 * y * (1.0 - off), y)
        factor = y * (root * root)
    elif NORM.kind == "0":
        y, factor = tl.full(scale.shape, 1.0, tl.float32), tl.zeros(scale.shape, tl.float32)
    else:
        y = tl.exp2(-beta * tl.log2(scale))
        factor = y / scale
    return y, factor


@triton.jit
def place(BLOCKS_P, C, P, PIXELS, COLUMNS: tl.constexpr):
    """Return a program's base offset, its columns' offsets from there, which are inside, and their first channel.

    NHWC: whole pixels of all PIXELS, as many as a block of threads holds. NCHW: `count` channels of a block of pixels.
    """
    PARTS: tl.constexpr = COLUMNS.parts
    EACH: tl.constexpr = COLUMNS.block // PARTS
    i = tl.arange(0, COLUMNS.block)
    pid = tl.program_id(0)
    if COLUMNS.channels_last:
        pixel = i // PARTS
        channel = i % PARTS * COLUMNS.count
        first = pid.to(tl.int64) * EACH
        base, at = first * C, i * COLUMNS.count
        inside = pixel < tl.minimum(PIXELS - first, EACH).to(tl.int32)
    else:
        channel = pid % PARTS * COLUMNS.count
        at = pid // PARTS % BLOCKS_P * COLUMNS.block + i
        base = (pid // PARTS // BLOCKS_P).to(tl.int64) * C * P + channel.to(tl.int64) * P
        inside = at < P
    return base, at, inside, channel


@triton.jit
def store_columns(ptr, at, inside, c, C, P, columns, COLUMNS: tl.constexpr):
    """Store a thread's channels."""
    COUNT: tl.constexpr = COLUMNS.count
    VECTOR: tl.constexpr = COLUMNS.vector
    if COLUMNS.channels_last:
        rows = at[:, None] + tl.arange(0, VECTOR)[None, :]
        for start in tl.static_range(0, COUNT, VECTOR):
            y = to_rows(columns, start, 1, VECTOR).to(ptr.dtype.element_ty)
            tl.store(ptr + (rows + start), y, mask=inside[:, None])
    else:
        for i in tl.static_range(COUNT):
            there = inside if COLUMNS.whole else inside & (c + i < C)
            tl.store(ptr + (at + i * P), columns[i].to(ptr.dtype.element_ty), mask=there)


@triton.jit
def lrn_columns_kernel(
    x_ptr, y_ptr, C, P, PIXELS, BLOCKS_P, alpha, beta, k,
    NORM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalize x: (N, C, P) into y; one program computes the channels of a thread of a block of pixels."""
    COUNT: tl.constexpr = COLUMNS.count
    SIZE: tl.constexpr = NORM.size
    BEFORE: tl.constexpr = SIZE // 2
    base, at, inside, c = place(BLOCKS_P, C, P, PIXELS, COLUMNS)
    x = load_columns(x_ptr + base, at, inside, c, C, P, BEFORE, SIZE - 1 - BEFORE, COLUMNS)
    squares = ()
    for i in tl.static_range(COUNT + SIZE - 1):
        squares = squares + (x[i] * x[i],)
    sums = window_sums(squares, SIZE, COUNT)
    y = ()
    for i in tl.static_range(COUNT):
        y = y + (x[BEFORE + i] * power(k + alpha / SIZE * sums[i], beta, NORM)[0],)
    store_columns(y_ptr + base, at, inside, c, C, P, y, COLUMNS)


@triton.jit
def lrn_columns_backward_kernel(
    x_ptr, grad_ptr, dx_ptr, C, P, PIXELS, BLOCKS_P, alpha, beta, k,
    NORM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Dx = grad * s ** -beta - 2 alpha beta / size * x * sum of grad * x * s ** (-beta - 1) over windows that hold c.

    x, grad, dx: (N, C, P); one program computes the channels of a thread of a block of pixels.
    """
    COUNT: tl.constexpr = COLUMNS.count
    SIZE: tl.constexpr = NORM.size
    # Of a window's channels so many are before and after its own; of the windows that hold a channel as many centres
    # are after and before it.
    AFTER: tl.constexpr = (SIZE - 1) // 2
    BEFORE: tl.constexpr = SIZE // 2
    base, at, inside, c = place(BLOCKS_P, C, P, PIXELS, COLUMNS)
    x = load_columns(x_ptr + base, at, inside, c, C, P, SIZE - 1, SIZE - 1, COLUMNS)
    grad = load_columns(grad_ptr + base, at, inside, c, C, P, AFTER, BEFORE, COLUMNS)
    squares = ()
    for i in tl.static_range(COUNT + 2 * (SIZE - 1)):
        squares = squares + (x[i] * x[i],)
    sums = window_sums(squares, SIZE, COUNT + SIZE - 1)
    powers, terms = (), ()
    for i in tl.static_range(COUNT + SIZE - 1):
        scale = k + alpha / SIZE * sums[i]
        y, factor = power(scale, beta, NORM)
        powers = powers + (y,)
        term = grad[i] * x[BEFORE + i] * factor
        channel = c + (i - AFTER)
        if i < AFTER:  # a scale outside the image may be zero
            term = tl.where(channel >= 0, term, 0.0)
        elif i >= AFTER + COUNT or not COLUMNS.whole:
            term = tl.where(channel < C, term, 0.0)
        terms = terms + (term,)
    through = window_sums(terms, SIZE, COUNT)
    dx = ()
    for i in tl.static_range(COUNT):
        slope = 2.0 * alpha * beta / SIZE * x[SIZE - 1 + i] * through[i]
        dx = dx + (grad[AFTER + i] * powers[AFTER + i] - slope,)
    store_columns(dx_ptr + base, at, inside, c, C, P, dx, COLUMNS)
