"""Local response normalization in Triton for short windows: a thread holds the channels that it needs as columns.

A column is one channel of some pixels. NHWC: the channels of one vector of 16 bytes or two, from their own loads and
their neighbours'. NCHW: one channel after another. Each scale and root is computed once and serves every window that
it is in.
"""

import triton
import triton.language as tl

from fastcnn.triton.tiles import widened

NCHW_COLUMNS = 16  # channels of a program


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
def load_columns(
    ptr,
    at,
    inside,
    c,
    C,
    P,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    COUNT: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Load COUNT channels from c on, BEFORE channels before them and AFTER after them: float32, zero outside the image.

    at: [V] offsets of channel c; c: [V], or one for all in NCHW.
    """
    found = ()
    if CHANNELS_LAST:
        rows = at[:, None] + tl.arange(0, VECTOR)[None, :]
        if BEFORE > 0:
            there = (inside & (c > 0))[:, None]
            columns = to_columns(widened(tl.load(ptr + (rows - VECTOR), mask=there, other=0.0)), VECTOR)
            for i in tl.static_range(BEFORE):
                found = found + (columns[VECTOR - BEFORE + i],)
        for part in tl.static_range(COUNT // VECTOR):
            x = widened(tl.load(ptr + (rows + part * VECTOR), mask=inside[:, None], other=0.0))
            found = found + to_columns(x, VECTOR)
        if AFTER > 0:
            there = (inside & (c + COUNT < C))[:, None]
            columns = to_columns(widened(tl.load(ptr + (rows + COUNT), mask=there, other=0.0)), VECTOR)
            for i in tl.static_range(AFTER):
                found = found + (columns[i],)
    else:
        for i in tl.static_range(BEFORE + COUNT + AFTER):
            there = inside
            if i < BEFORE:
                there = inside & (c + (i - BEFORE) >= 0)
            elif i >= BEFORE + COUNT or not WHOLE:
                there = inside & (c + (i - BEFORE) < C)
            found = found + (tl.load(ptr + (at + (i - BEFORE) * P), mask=there, other=0.0).to(tl.float32),)
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
def refined(y, scale):
    """Return y, an approximation of scale ** -0.75, after one step of Newton's: as exact as float32 is."""
    half = y * y * scale  # scale ** -0.5
    off = half * half * scale  # 1, but for the error
    return tl.where(off > 0.5, y + 0.25 * y * (1.0 - off), y)  # not where something has under- or overflown


@triton.jit
def power(scale, beta, KIND: tl.constexpr, REFINE: tl.constexpr):
    """Return scale ** -beta and scale ** (-beta - 1).

    KIND "3/4" is beta = 0.75 without a logarithm; "0" is beta = 0, which takes the second times zero, and a scale may
    be zero.
    """
    if KIND == "3/4":
        root = tl.rsqrt(scale)
        y = root * tl.sqrt(root)
        if REFINE:
            y = refined(y, scale)
        factor = y * (root * root)
    elif KIND == "0":
        y, factor = tl.full(scale.shape, 1.0, tl.float32), tl.zeros(scale.shape, tl.float32)
    else:
        y = tl.exp2(-beta * tl.log2(scale))
        factor = y / scale
    return y, factor


@triton.jit
def place(
    BLOCKS_P, C, P, PIXELS, PARTS, EACH, INVERSE, COUNT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return a program's base offset, its columns' offsets from there, which are inside, and their first channel.

    An image's channels are PARTS times COUNT. NHWC: EACH whole pixels of all PIXELS, as many as BLOCK threads hold;
    INVERSE = 2**16 / PARTS, rounded up. NCHW: COUNT channels of BLOCK pixels of an image.
    """
    i = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    if CHANNELS_LAST:
        pixel = (i * INVERSE) >> 16
        channel = (i - pixel * PARTS) * COUNT
        first = pid.to(tl.int64) * EACH
        base, at = first * C, i * COUNT
        inside = pixel < tl.minimum(PIXELS - first, EACH).to(tl.int32)
    else:
        channel = pid % PARTS * COUNT
        at = pid // PARTS % BLOCKS_P * BLOCK + i
        base = (pid // PARTS // BLOCKS_P).to(tl.int64) * C * P + channel.to(tl.int64) * P
        inside = at < P
    return base, at, inside, channel


@triton.jit
def store_columns(
    ptr, at, inside, c, C, P, columns,
    COUNT: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Store COUNT channels."""
    if CHANNELS_LAST:
        rows = at[:, None] + tl.arange(0, VECTOR)[None, :]
        for part in tl.static_range(COUNT // VECTOR):
            y = to_rows(columns, part * VECTOR, 1, VECTOR).to(ptr.dtype.element_ty)
            tl.store(ptr + (rows + part * VECTOR), y, mask=inside[:, None])
    else:
        for i in tl.static_range(COUNT):
            there = inside if WHOLE else inside & (c + i < C)
            tl.store(ptr + (at + i * P), columns[i].to(ptr.dtype.element_ty), mask=there)


@triton.jit
def lrn_columns_kernel(
    x_ptr,
    y_ptr,
    C,
    P,
    PIXELS,
    PARTS,
    EACH,
    INVERSE,
    BLOCKS_P,
    alpha,
    beta,
    k,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    REFINE: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COUNT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize x: (N, C, P) into y; one program computes COUNT channels of BLOCK pixels."""
    base, at, inside, c = place(
        BLOCKS_P, C, P, PIXELS, PARTS, EACH, INVERSE, COUNT, CHANNELS_LAST, BLOCK
    )  # fmt: skip
    BEFORE: tl.constexpr = SIZE // 2
    x = load_columns(
        x_ptr + base, at, inside, c, C, P, BEFORE, SIZE - 1 - BEFORE, COUNT, VECTOR, WHOLE, CHANNELS_LAST
    )  # fmt: skip
    squares = ()
    for i in tl.static_range(COUNT + SIZE - 1):
        squares = squares + (x[i] * x[i],)
    sums = window_sums(squares, SIZE, COUNT)
    y = ()
    for i in tl.static_range(COUNT):
        y = y + (x[BEFORE + i] * power(k + alpha / SIZE * sums[i], beta, KIND, REFINE)[0],)
    store_columns(y_ptr + base, at, inside, c, C, P, y, COUNT, VECTOR, WHOLE, CHANNELS_LAST)


@triton.jit
def lrn_columns_backward_kernel(
    x_ptr,
    grad_ptr,
    dx_ptr,
    C,
    P,
    PIXELS,
    PARTS,
    EACH,
    INVERSE,
    BLOCKS_P,
    alpha,
    beta,
    k,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    REFINE: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COUNT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dx = grad * s ** -beta - 2 alpha beta / size * x * sum of grad * x * s ** (-beta - 1) over windows that hold c.

    x, grad, dx: (N, C, P); one program computes COUNT channels of BLOCK pixels.
    """
    base, at, inside, c = place(
        BLOCKS_P, C, P, PIXELS, PARTS, EACH, INVERSE, COUNT, CHANNELS_LAST, BLOCK
    )  # fmt: skip
    # Of a window's channels so many are before and after its own; of the windows that hold a channel as many centres
    # are after and before it.
    AFTER: tl.constexpr = (SIZE - 1) // 2
    BEFORE: tl.constexpr = SIZE // 2
    x = load_columns(
        x_ptr + base, at, inside, c, C, P, SIZE - 1, SIZE - 1, COUNT, VECTOR, WHOLE, CHANNELS_LAST
    )  # fmt: skip
    grad = load_columns(
        grad_ptr + base, at, inside, c, C, P, AFTER, BEFORE, COUNT, VECTOR, WHOLE, CHANNELS_LAST
    )  # fmt: skip
    squares = ()
    for i in tl.static_range(COUNT + 2 * (SIZE - 1)):
        squares = squares + (x[i] * x[i],)
    sums = window_sums(squares, SIZE, COUNT + SIZE - 1)
    powers, terms = (), ()
    for i in tl.static_range(COUNT + SIZE - 1):
        scale = k + alpha / SIZE * sums[i]
        y, factor = power(scale, beta, KIND, REFINE)
        powers = powers + (y,)
        term = grad[i] * x[BEFORE + i] * factor
        channel = c + (i - AFTER)
        if i < AFTER:  # a scale outside the image may be zero
            term = tl.where(channel >= 0, term, 0.0)
        elif i >= AFTER + COUNT or not WHOLE:
            term = tl.where(channel < C, term, 0.0)
        terms = terms + (term,)
    through = window_sums(terms, SIZE, COUNT)
    dx = ()
    for i in tl.static_range(COUNT):
        slope = 2.0 * alpha * beta / SIZE * x[SIZE - 1 + i] * through[i]
        dx = dx + (grad[AFTER + i] * powers[AFTER + i] - slope,)
    store_columns(dx_ptr + base, at, inside, c, C, P, dx, COUNT, VECTOR, WHOLE, CHANNELS_LAST)
