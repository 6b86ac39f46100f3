"""Issue time beside memory time of the memory-bound CUDA kernels, on the networks' own layers.

    python tests/cuda_headline.py [--json] [part of a case's name]

Counts the instructions that the built extension's code for sm_90 has (issue_slots.py); no GPU. How often a loop runs is
computed as csrc/cuda/walk.h shares a tensor out. Loops inside a loop are for NaN, for windows at a border and for the
next image: they are taken to run never, the code around them always. A case is one operator: its kernels are summed.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import issue_slots
from extension_codegen import dump, kernel_name
from limits import COPY

TYPES = {"bf16": ("BFloat16", 2), "fp32": ("float", 4)}
POOL3, POOL2 = 3, 2  # the sides of windows, at a stride of 2
# Images, channels, height = width: torchvision's AlexNet and the paper's at batch 128, VGG-16 at batch 64.
PLANES = {
    "AlexNet 55": (128, 64, 55),
    "AlexNet 27": (128, 192, 27),
    "AlexNet 13": (128, 384, 13),
    "VGG 224": (64, 64, 224),
    "VGG 28": (64, 512, 28),
    "VGG 14": (64, 512, 14),
}
POOLED = {
    "AlexNet 55": ((128, 64, 55), POOL3),
    "AlexNet 27": ((128, 192, 27), POOL3),
    "VGG 224": ((64, 64, 224), POOL2),
    "VGG 28": ((64, 512, 28), POOL2),
}
NORMED = {"paper 55": (128, 96, 55), "paper 27": (128, 256, 27)}
BATCH_NORMED = {"VGG 224": (64, 64, 224), "VGG 28": (64, 512, 28)}
MOST_BLOCKS, MOST_SUMS, MOST_STATISTICS, BLOCK, LRN_BLOCK = 8192, 4096, 2048, 256, 128  # of walk.h and lrn.h


class Launch(NamedTuple):
    """One kernel of a case: its loops run over `items`, each `loads` accesses of global memory long."""

    kernel: str
    blocks: int
    threads: int
    items: float = 0.0
    loads: int = 1
    steps: float = 0.0  # in which a block adds up its rows
    shared_items: float = 0.0  # of a loop that reads shared memory


class Case(NamedTuple):
    """One operator on one tensor."""

    name: str
    bytes: float
    launches: list[Launch]


class Shape(NamedTuple):
    """A tensor (N, C, side, side) of a type in a layout."""

    type: str
    size: int  # bytes of an element
    last: bool  # channels_last
    images: int
    channels: int
    side: int

    @property
    def elements(self) -> int:
        """Return how many there are."""
        return self.images * self.channels * self.side**2

    @property
    def width(self) -> int:
        """Return the elements of 16 bytes."""
        return 16 // self.size


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def added(rows: int, lanes: int) -> float:
    """Return the steps in which a block adds up rows, as if by all its warps; one without rows to add costs a fifth."""
    warps, steps = ceil_div(rows * lanes, 32), 0.0
    while rows > 1:
        half = (rows + 1) // 2
        busy = ceil_div((rows - half) * lanes, 32) / warps
        steps += busy + 0.2 * (1 - busy)
        rows = half
    return steps


def walk(shape: Shape, places: int, width: int, depth: int, most: int, vector: bool = False) -> dict[str, Any]:
    """Return blocks, threads, items and rows as make_walks in walk.h does; items are a warp's on average."""
    if shape.last:
        vectors = shape.channels // width
        parts = ceil_div(vectors, BLOCK)
        lanes, total, teams = ceil_div(vectors, parts), shape.images * places, 1
        rows = BLOCK // lanes
    else:
        parts, lanes, total = shape.images * shape.channels, 1, places
        least = 8 if vector else 32
        rows = min(max(ceil_div(ceil_div(places, 8), least) * least, 1), min(places, BLOCK))
        teams = BLOCK // rows
    shares = min(max(most * teams // parts, 1), max(ceil_div(total, rows * depth), 1))
    share = ceil_div(ceil_div(total, shares), rows) * rows
    shares = ceil_div(total, share)
    starts = [warp * 32 // lanes for warp in range(ceil_div(lanes * rows, 32))]  # the first row of each warp
    passes = [
        sum(max(ceil_div(size - start, rows), 0) for start in starts) / len(starts)
        for size in (share, total % share or share)
    ]
    items = (passes[0] * (shares - 1) + passes[1]) / shares
    threads = ceil_div(lanes * rows * teams, 32) * 32
    blocks, steps = ceil_div(parts * shares, teams), added(rows, lanes)
    return {"blocks": blocks, "threads": threads, "items": items, "steps": steps, "shares": shares}


def vectors(shape: Shape) -> tuple[int, bool, int]:
    """Return the elements of an access, whether they are channels, and the places of a plane, as vectors.h does."""
    pixels = shape.side**2
    if shape.last and shape.channels % shape.width == 0:
        return shape.width, True, pixels
    if not shape.last and pixels % shape.width == 0:
        return shape.width, False, pixels // shape.width
    return 1, True, pixels


def elementwise(kernel: str, shape: Shape, depth: int, most: int, loads: int, *flags: bool) -> Launch:
    """Return a launch over all elements."""
    width, along, places = vectors(shape)
    found = walk(shape, places, width, depth, most, width > 1)
    steps, _ = found.pop("steps"), found.pop("shares")
    arguments = ", ".join([shape.type, str(width), *(str(flag).lower() for flag in (along, *flags))])
    return Launch(f"{kernel}<{arguments}>", loads=loads, steps=0.0 if most == MOST_BLOCKS else steps, **found)


def add_partials(shape: Shape, places: int, width: int, depth: int) -> Launch:
    """Return the launch that adds up the sums of blocks."""
    partial_rows = walk(shape, places, width, depth, MOST_SUMS, width > 1)["shares"] * (
        1 if shape.last else shape.images
    )
    rows = min(partial_rows, 128)
    return Launch(
        f"add_partials_kernel<{shape.type}>", ceil_div(shape.channels, 8), ceil_div(8 * rows, 32) * 32,
        partial_rows / rows, 1, added(rows, 8),
    )  # fmt: skip


def pooling(shape: Shape, window: int, stage: bool) -> Launch:
    """Return the launch of a max-pool, with bias and ReLU if `stage`."""
    out, stage_name = (shape.side - window) // 2 + 1, str(stage).lower()
    if not shape.last and window == 2 and shape.side % shape.width == 0:
        found = walk(shape, out * shape.side // shape.width, 1, 2, MOST_BLOCKS, True)
        kernel, loads = f"pool_pairs_kernel<{shape.type}, {stage_name}>", 2
    else:
        width = shape.width if shape.last and shape.channels % shape.width == 0 else 1
        found = walk(shape, out**2, width, 2, MOST_BLOCKS)
        kernel, loads = f"pool_kernel<{shape.type}, {width}, {window}, {stage_name}>", window**2
    return Launch(kernel, found["blocks"], found["threads"], found["items"], loads)


def unpooling(shape: Shape, window: int, sums: bool) -> list[Launch]:
    """Return the launches of a max-pool's backward, with a bias gradient if `sums`."""
    places, most = ceil_div(shape.side, 2) ** 2, MOST_SUMS if sums else MOST_BLOCKS
    width = shape.width if shape.last and shape.channels % shape.width == 0 else 1
    found = walk(shape, places, width, 4, most)
    kernel, loads = f"unpool_patches_kernel<{shape.type}, {width}, {window}>", 2 * (window - 1) ** 2
    steps = found["steps"] if sums else 0.0
    first = Launch(kernel, found["blocks"], found["threads"], found["items"], loads, steps)
    return [first, add_partials(shape, places, width, 4)] if sums else [first]


def lrn(kernel: str, shape: Shape, gradient: str = "") -> Launch:
    """Return a launch that has a thread for each run of 32 bytes of channels."""
    runs = shape.images * shape.side**2 * ceil_div(shape.channels, 32 // shape.size)
    path = f"(Path){0 if shape.last else 1}"
    arguments = f"{shape.type}, {path}" + (f", {gradient}<{shape.type}> " if gradient else "")
    return Launch(f"{kernel}<{arguments}>", ceil_div(runs, LRN_BLOCK), LRN_BLOCK)


def lrn_pool(shape: Shape) -> Launch:
    """Return the launch of an LRN with a max-pool of 3x3 windows, tiled as make_plan in lrn_pool.cu does."""
    run, out = 32 // shape.size, (shape.side - 3) // 2 + 1

    def balanced(length: int, most: int) -> int:
        return ceil_div(length, ceil_div(length, most))

    unit = shape.width if shape.last else 1
    channels = ceil_div(balanced(shape.channels, run * (4 if shape.last else 2)), unit) * unit
    rows, columns = balanced(out, 8 if shape.last else 4), balanced(out, 8 if shape.last else 32)

    def pixels() -> int:
        return min(2 * rows + 1, shape.side) * min(2 * columns + 1, shape.side)

    while pixels() * channels * shape.size > 40 * 1024 and rows * columns > 1:
        rows, columns = (rows, ceil_div(columns, 2)) if rows < columns else (ceil_div(rows, 2), columns)
    blocks = shape.images * ceil_div(out, rows) * ceil_div(out, columns) * ceil_div(shape.channels, channels)
    items, shared = pixels() * ceil_div(channels, run), rows * columns * channels // unit
    arguments = f"{shape.type}, (Path){0 if shape.last else 1}, 3"
    return Launch(
        f"lrn_pool_kernel<{arguments}>", blocks, BLOCK, ceil_div(items, 32) / 8, 4 if shape.last else run + 4,
        shared_items=ceil_div(shared, 32) / 8,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield every case."""
    for type_name in TYPES:
        for layout in ("NHWC", "NCHW"):
            for case in operators(type_name, layout):
                yield case._replace(name=f"{type_name} {layout} {case.name}")


def operators(type_name: str, layout: str) -> Iterator[Case]:
    """Yield those of one type and layout."""
    cpp, size = TYPES[type_name]

    def new(images: int, channels: int, side: int) -> Shape:
        return Shape(cpp, size, layout == "NHWC", images, channels, side)

    for name, dimensions in PLANES.items():
        x = new(*dimensions)
        width, _, places = vectors(x)
        whole = x.last or x.side**2 % x.width == 0
        flat = Launch(f"bias_relu_flat_kernel<{cpp}, {x.width}>", ceil_div(x.elements, BLOCK * x.width), BLOCK)
        bias = elementwise("bias_relu_kernel", x, 4, MOST_BLOCKS, 1) if whole else flat
        yield Case(f"bias+ReLU {name}", 2 * x.elements * size, [bias])
        mask = elementwise("mask_kernel", x, 8, MOST_SUMS, 2)
        yield Case(f"bias+ReLU backward {name}", 3 * x.elements * size, [mask, add_partials(x, places, width, 8)])
    for name, (dimensions, window) in POOLED.items():
        x = new(*dimensions)
        y = x._replace(side=(x.side - window) // 2 + 1)
        moved = x.elements * size + y.elements * (size + 1)
        yield Case(f"bias+ReLU+pool {name}", moved, [pooling(x, window, True)])
        yield Case(f"bias+ReLU+pool backward {name}", moved, unpooling(x, window, True))
        yield Case(f"max-pool {name}", moved, [pooling(x, window, False)])
        yield Case(f"max-pool backward {name}", moved, unpooling(x, window, False))
    for name, dimensions in NORMED.items():
        x = new(*dimensions)
        y = x._replace(side=(x.side - 3) // 2 + 1)
        pooled = y.elements * (size + 1)
        yield Case(f"LRN {name}", 2 * x.elements * size, [lrn("lrn_kernel", x)])
        yield Case(f"LRN backward {name}", 3 * x.elements * size, [lrn("lrn_backward_kernel", x, "GivenGradient")])
        yield Case(f"LRN+pool {name}", x.elements * size + pooled, [lrn_pool(x)])
        backward = [lrn("lrn_backward_kernel", x, "PooledGradient")]
        yield Case(f"LRN+pool backward {name}", 2 * x.elements * size + pooled, backward)
    for name, dimensions in BATCH_NORMED.items():
        x = new(*dimensions)
        moved = x.elements * size
        yield Case(f"batch norm statistics {name}", moved, [elementwise("moments_kernel", x, 32, MOST_STATISTICS, 1)])
        yield Case(f"batch norm+ReLU {name}", 2 * moved, [elementwise("bn_relu_kernel", x, 2, MOST_BLOCKS, 1)])
        sums, gradient = (
            elementwise("sums_kernel", x, 8, MOST_SUMS, 2, True),
            elementwise("gradient_kernel", x, 8, MOST_SUMS, 2, True, True)._replace(steps=0.0),
        )
        yield Case(f"batch norm+ReLU backward {name}", 5 * moved, [sums, gradient])
    x = new(64, 256, 56)
    blocks = ceil_div(x.elements, BLOCK * x.width)
    for mask, name in enumerate(("add+ReLU ResNet 56", "add+ReLU backward ResNet 56")):
        kernel = f"combine_kernel<{cpp}, {x.width}, {'true' if mask else 'false'}>"
        yield Case(name, 3 * x.elements * size, [Launch(kernel, blocks, BLOCK)])


def passes(code: issue_slots.Code, launch: Launch) -> list[float]:
    """Return how often each loop of a kernel runs, in the order of issue_slots.loops."""
    held = issue_slots.loops(code)

    def accesses(loop: tuple[int, int], opcode: str) -> int:
        inner = [each for each in held if each != loop and loop[0] <= each[0] and each[1] <= loop[1]]
        inside = (each for each in code if loop[0] <= each.address <= loop[1])
        return sum(
            each.opcode.split(".")[0] == opcode and not any(a <= each.address <= b for a, b in inner) for each in inside
        )

    nested = {loop for loop in held for other in held if loop != other and other[0] <= loop[0] and loop[1] <= other[1]}
    often = dict.fromkeys(held, 0.0)
    data = [loop for loop in held if loop not in nested and accesses(loop, "LDG")]
    left = launch.items
    for loop in sorted(data, key=lambda loop: -accesses(loop, "LDG")):  # several items at once, then one by one
        unit = max(accesses(loop, "LDG") / launch.loads, 1.0)
        often[loop] = math.floor(left / unit + 1e-9) if unit > 1.5 else left
        left -= often[loop] * unit
    for loop in held:
        if accesses(loop, "BAR"):
            often[loop] = launch.steps
        elif loop not in nested and loop not in data and accesses(loop, "LDS"):
            often[loop] = launch.shared_items
        elif "PooledGradient" in launch.kernel:  # a pixel is under one or two windows of an axis
            often[loop] = 1.5
    return [often[loop] for loop in held]


def count(case: Case, code: dict[str, issue_slots.Code]) -> dict[str, Any]:
    """Return issue and memory time of a case, and its kernels."""
    issue, kernels = 0.0, []
    for launch in case.launches:
        body = issue_slots.body(code[launch.kernel])
        work = issue_slots.work(body, passes(body, launch))
        issue += issue_slots.issue_seconds(work.clocks, launch.blocks * launch.threads / 32)
        kernels.append(
            {
                "kernel": launch.kernel,
                "instructions": work.instructions,
                "loads": sorted(issue_slots.widths(body, "LDG").items()),
                "stores": sorted(issue_slots.widths(body, "STG").items()),
            }
        )
    return {"case": case.name, "issue": issue, "memory": case.bytes / COPY, "kernels": kernels}


def count_all(part: str = "", listing: str = "") -> list[dict[str, Any]]:
    """Count every case whose name has a part, by the extension's listing or another."""
    functions = issue_slots.functions(listing or dump("-sass", "-arch", "sm_90"))
    code = {kernel_name(name): body for name, body in functions}
    return [count(case, code) for case in cases() if part in case.name]


# Why a case takes longer to issue than AIM allows; the first whose pattern is found in the case's name.
WHY = {
    "LRN.pool backward": "up to four windows a pixel, whose codes are compared in the halo channels too",
    "LRN.pool": "the arithmetic of an LRN for half of its bytes; pixels under two tiles are normalized twice",
    "bf16 NHWC .*pool backward": "nine comparisons of one-byte codes for four pixels of two bytes",
    "NCHW .*pool": "rows of any length start anywhere: one value a thread and access",
    "bf16 NCHW LRN": "channels lie a plane apart: two bytes an access",
    "NCHW batch norm statistics": "a plane of 784 pixels is merged by the eight or sixteen threads that read it",
    "NCHW bias.ReLU": "planes of any size start anywhere: one value an access",
}


def reason(case: str) -> str:
    """Return why a case takes longer to issue than AIM allows, or an empty string."""
    return next((why for pattern, why in WHY.items() if re.search(pattern, case)), "")


def main() -> None:
    """Print the table, or JSON."""
    rows = count_all(*[each for each in sys.argv[1:] if each != "--json"])
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print(f"{'case':46} {'issue':>6} {'memory':>6} {'ratio':>5} {'copy':>5}  kernel (instructions)  loads; stores")
    for row in rows:
        ratio, share = row["issue"] / row["memory"], issue_slots.share_of_copy(row["issue"], row["memory"])
        head = f"{row['case']:46} {row['issue'] * 1e6:6.1f} {row['memory'] * 1e6:6.1f} {ratio:5.2f} {share:5.0%}"
        for kernel in row["kernels"]:
            widths = ["+".join(f"{n}x{width}" for width, n in kernel[key]) for key in ("loads", "stores")]
            print(f"{head:72}  {kernel['kernel']} ({kernel['instructions']:.0f})  {widths[0]}; {widths[1]}")
            head = ""
        if ratio > issue_slots.AIM:
            print(f"{'':46} because: {reason(row['case'])}")
    print("issue, memory: µs in which an H200 issues the instructions, and moves each tensor once; copy: the smaller")
    print(
        "ceiling as a share of the copy bandwidth; loads; stores: how many there are in the code, of so many bytes each"
    )


if __name__ == "__main__":
    main()
