"""Issue time beside memory time of the memory-bound CUDA kernels, on the networks' own layers.

    python tests/cuda_headline.py [--json] [part of a case's name, and an object file instead of the extension]

Counts the instructions that the built extension's code for sm_90 has (issue_slots.py); no GPU. How often a loop runs is
computed as csrc/cuda/walk.h and strips.h share a tensor out. Loops inside a loop are for NaN, for windows at a border
and for the next image: they are taken to run never, the code around them always. A case is one operator: its kernels
are summed.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import issue_slots
import limits
import stock_cases
from extension_codegen import dump, kernel_name, resources
from planes import BATCH_NORMED, NORMED, PLANES, POOLED

TYPES = {"bf16": ("BFloat16", 2), "fp32": ("float", 4)}
MOST_BLOCKS, MOST_SUMS, MOST_STATISTICS, BLOCK, LRN_BLOCK = 8192, 4096, 2048, 256, 128  # of walk.h and lrn.h


class Launch(NamedTuple):
    """One kernel of a case: its loops run over `items`, each `loads` accesses of global memory long."""

    kernel: str
    blocks: int
    threads: int
    items: float = 0.0
    loads: int = 1
    steps: float = 0.0  # in which a block adds up its rows
    often: tuple[float, ...] = ()  # of a kernel that goes through shared memory: how often its loops run, in order
    inner: float = 0.0  # and the loops in these: a thread's rows
    shared: int = 0  # bytes that a block has of it
    branches: tuple[float, ...] = ()  # of a kernel without loops: its way, as issue_slots.follow takes it


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


def walk(
    shape: Shape, places: int, width: int, depth: int, most: int, vector: bool = False, plane_depth: int = 8
) -> dict[str, Any]:
    """Return blocks, threads, items and rows as make_walks in walk.h does; items are a warp's on average."""
    if shape.last:
        vectors = shape.channels // width
        parts = ceil_div(vectors, BLOCK)
        lanes, total, teams = ceil_div(vectors, parts), shape.images * places, 1
        rows = BLOCK // lanes
    else:
        parts, lanes, total = shape.images * shape.channels, 1, places
        least = 8 if vector else 32
        rows = min(max(ceil_div(ceil_div(places, plane_depth), least) * least, 1), min(places, BLOCK))
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


def elementwise(
    kernel: str, shape: Shape, depth: int, most: int, loads: int, *flags: bool, plane_depth: int = 8
) -> Launch:
    """Return a launch over all elements."""
    width, along, places = vectors(shape)
    found = walk(shape, places, width, depth, most, width > 1, plane_depth)
    steps, _ = found.pop("steps"), found.pop("shares")
    arguments = ", ".join([shape.type, str(width), *(str(flag).lower() for flag in (along, *flags))])
    return Launch(f"{kernel}<{arguments}>", loads=loads, steps=0.0 if most == MOST_BLOCKS else steps, **found)


def add_partials(shape: Shape, shares: int) -> Launch:
    """Return the launch that adds up the sums of blocks, each of a share of a plane (NCHW) or of all places."""
    partial_rows = shares * (1 if shape.last else shape.images)
    rows = min(partial_rows, 128)
    return Launch(
        f"add_partials_kernel<{shape.type}>", ceil_div(shape.channels, 8), ceil_div(8 * rows, 32) * 32,
        partial_rows / rows, 1, added(rows, 8),
    )  # fmt: skip


def mask(shape: Shape) -> list[Launch]:
    """Return the launches of a ReLU's backward with the sums for a bias gradient."""
    width, _, places = vectors(shape)
    if shape.last or width > 1:
        first = elementwise("mask_kernel", shape, 8, MOST_SUMS, 2)
        return [first, add_partials(shape, walk(shape, places, width, 8, MOST_SUMS, width > 1)["shares"])]
    found = walk(shape, ceil_div(places + shape.width - 1, shape.width), 1, 8, MOST_SUMS, vector=True)
    shares = found.pop("shares")
    return [Launch(f"mask_planes_kernel<{shape.type}, {shape.width}>", loads=2, **found), add_partials(shape, shares)]


def strips(shape: Shape, rows: int, columns: int, step: int, each: int) -> dict[str, Any]:
    """Return blocks, threads and items as strips.h does."""
    planes, across = shape.images * shape.channels, ceil_div(columns, each)
    down = ceil_div(rows, 32)
    while down * step < rows and planes * across * down < 1 << 17:
        down *= 2
    height = ceil_div(ceil_div(rows, down), step) * step
    places = ceil_div(rows, height) * across
    team = min(places, BLOCK)
    teams, shares = BLOCK // team, ceil_div(places, team)
    blocks, threads = ceil_div(planes * shares, teams), ceil_div(team * teams, 32) * 32
    return {"blocks": blocks, "threads": threads, "items": height / step, "steps": added(team, 1), "shares": shares}


def pooling(shape: Shape, window: int, stage: bool) -> Launch:
    """Return the launch of a max-pool, with bias and ReLU if `stage`."""
    out, stage_name = (shape.side - window) // 2 + 1, str(stage).lower()
    vectors_of_plane = out * shape.side // shape.width
    if not shape.last and window == 2 and shape.side % shape.width == 0 and vectors_of_plane >= BLOCK:
        found = walk(shape, vectors_of_plane, 1, 2, MOST_BLOCKS, True)
        kernel, loads = f"pool_pairs_kernel<{shape.type}, {stage_name}>", 2
    elif not shape.last:
        found = strips(shape, out, out, 1, 2)
        kernel, loads = f"pool_strips_kernel<{shape.type}, {window}, {stage_name}, true>", 2 * (window + 2)
    else:
        width = shape.width if shape.channels % shape.width == 0 else 1
        found = walk(shape, out**2, width, 2, MOST_BLOCKS)
        kernel, loads = f"pool_kernel<{shape.type}, {width}, {window}, {stage_name}>", window**2
    return Launch(kernel, found["blocks"], found["threads"], found["items"], loads)


def unpooling(shape: Shape, window: int, sums: bool) -> list[Launch]:
    """Return the launches of a max-pool's backward, with a bias gradient if `sums`."""
    patches, most = ceil_div(shape.side, 2), MOST_SUMS if sums else MOST_BLOCKS
    loads = 2 * (window - 1) ** 2
    if shape.last:
        width = shape.width if shape.channels % shape.width == 0 else 1
        found = walk(shape, patches**2, width, 4, most)
        kernel = f"unpool_patches_kernel<{shape.type}, {width}, {window}>"
    else:
        found = strips(shape, patches, patches, 2, 1)
        kernel, loads = f"unpool_strips_kernel<{shape.type}, {window}, {str(sums).lower()}>", 4 * (window - 1)
    shares, steps = found.pop("shares"), found.pop("steps") if sums else 0.0
    first = Launch(kernel, loads=loads, steps=steps, **{key: found[key] for key in ("blocks", "threads", "items")})
    return [first, add_partials(shape, shares)] if sums else [first]


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

    width = shape.width if shape.last else 1  # of a thread that pools
    unit = shape.width if shape.last else 2
    channels = ceil_div(balanced(shape.channels, run * (4 if shape.last else 2)), unit) * unit
    rows, columns = balanced(out, 13 if shape.last else 4), balanced(out, 13 if shape.last else 32)

    def pixels() -> int:
        return min(2 * rows + 1, shape.side) * min(2 * columns + 1, shape.side)

    while pixels() * channels * shape.size > 48 * 1024 and channels > 2 * run:
        channels = max(2 * run, ceil_div(channels // 2, unit) * unit)
    while pixels() * channels * shape.size > 48 * 1024 and rows * columns > 1:
        rows, columns = (rows, ceil_div(columns, 2)) if rows < columns else (ceil_div(rows, 2), columns)
    blocks = shape.images * ceil_div(out, rows) * ceil_div(out, columns) * ceil_div(shape.channels, channels)
    items = pixels() * ceil_div(channels, run)
    groups = columns * channels // width if shape.last else ceil_div(columns, 2) * channels
    strip = max(ceil_div(rows, max(BLOCK // groups, 1)), 3) if shape.last else rows
    shared = groups * ceil_div(rows, strip)
    arguments = f"{shape.type}, (Path){0 if shape.last else 1}, 3, true, true"
    often = (ceil_div(items, 32) / 8, ceil_div(shared, 32) / 8)
    bytes = pixels() * channels * shape.size
    return Launch(
        f"lrn_pool_kernel<{arguments}>", blocks, BLOCK, often=often, inner=rows / ceil_div(rows, strip), shared=bytes
    )


def lrn_pool_backward(shape: Shape) -> Launch:
    """Return the launch of its backward: in channels_last by patches, as lrn_pool_backward.cu shares them out."""
    if not shape.last:
        return lrn("lrn_backward_kernel", shape, "PooledGradient")
    columns, of_a_patch = ceil_div(shape.side, 2), 4 * shape.channels * shape.size
    across = ceil_div(columns, max(32 * 1024 // of_a_patch, 1))
    patches = ceil_div(columns, across)
    items = (patches * shape.channels // shape.width, 4 * patches * ceil_div(shape.channels, 32 // shape.size))
    warps = LRN_BLOCK // 32
    return Launch(
        f"lrn_unpool_kernel<{shape.type}, 3>", shape.images * columns * across, LRN_BLOCK,
        often=tuple(ceil_div(each, 32) / warps for each in items), shared=patches * of_a_patch,
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
        whole = x.last or x.side**2 % x.width == 0
        flat = Launch(f"bias_relu_flat_kernel<{cpp}, {x.width}>", ceil_div(x.elements, BLOCK * x.width), BLOCK)
        bias = elementwise("bias_relu_kernel", x, 4, MOST_BLOCKS, 1) if whole else flat
        yield Case(f"bias+ReLU {name}", 2 * x.elements * size, [bias])
        yield Case(f"bias+ReLU backward {name}", 3 * x.elements * size, mask(x))
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
        yield Case(f"LRN+pool backward {name}", 2 * x.elements * size + pooled, [lrn_pool_backward(x)])
    for name, dimensions in BATCH_NORMED.items():
        x = new(*dimensions)
        moved = x.elements * size
        moments = elementwise("moments_kernel", x, 32, MOST_STATISTICS, 1, plane_depth=32)
        yield Case(f"batch norm statistics {name}", moved, [moments])
        yield Case(f"batch norm+ReLU {name}", 2 * moved, [elementwise("bn_relu_kernel", x, 2, MOST_BLOCKS, 1)])
        sums, gradient = (
            elementwise("sums_kernel", x, 8, MOST_SUMS, 2, True),
            elementwise("gradient_kernel", x, 8, MOST_SUMS, 2, True, True)._replace(steps=0.0),
        )
        yield Case(f"batch norm+ReLU backward {name}", 5 * moved, [sums, gradient])
    x = new(64, 256, 56)
    blocks = ceil_div(x.elements, BLOCK * 8)
    for backward, name in ((False, "add+ReLU ResNet 56"), (True, "add+ReLU backward ResNet 56")):
        kernel = f"combine_kernel<{cpp}, {x.width}, {str(backward).lower()}>"
        yield Case(name, 3 * x.elements * size, [Launch(kernel, blocks, BLOCK, branches=(1,))])


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
    if launch.often:
        around = {
            loop: [one for one in held if one != loop and one[0] <= loop[0] and loop[1] <= one[1]] for loop in held
        }
        outer = [loop for loop in held if not around[loop]]
        assert len(outer) == len(launch.often), launch.kernel
        times = dict(zip(outer, launch.often, strict=True))
        return [times.get(loop, launch.inner if len(around[loop]) == 1 else 0.0) for loop in held]
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
        elif "PooledGradient" in launch.kernel:  # a pixel is under one or two windows of an axis
            often[loop] = 1.5
    return [often[loop] for loop in held]


def count(case: Case, code: dict[str, issue_slots.Code], used: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return issue and memory time of a case, and its kernels."""
    issue, kernels = 0.0, []
    for launch in case.launches:
        body = issue_slots.body(code[launch.kernel])
        if launch.branches:
            work = issue_slots.work_on_way(body, launch.branches)
        else:
            work = issue_slots.work(body, passes(body, launch))
        issue += issue_slots.issue_seconds(work.clocks, launch.blocks * launch.threads / 32)
        registers, stack = (used[launch.kernel][key] for key in ("registers", "stack"))
        kernels.append(
            {
                "kernel": launch.kernel,
                "instructions": work.instructions,
                "registers": registers,
                "stack": stack,
                "occupancy": limits.occupancy(90, launch.threads // 32, registers, launch.shared),
                "loads": sorted(issue_slots.widths(body, "LDG").items()),
                "stores": sorted(issue_slots.widths(body, "STG").items()),
            }
        )
    return {"case": case.name, "issue": issue, "memory": case.bytes / limits.COPY, "kernels": kernels}


def count_all(part: str = "", binary: str = "") -> list[dict[str, Any]]:
    """Count every case whose name has a part, by the extension's code or, where its kernels are, another file's."""
    functions = issue_slots.functions(dump("-sass", "-arch", "sm_90", binary=binary))
    code = {kernel_name(name): body for name, body in functions}
    used = {row["kernel"]: row for row in resources(binary) if row["architecture"] == "sm_90"}
    wanted = (case for case in cases() if part in case.name)
    if binary:
        wanted = (case for case in wanted if all(launch.kernel in code for launch in case.launches))
    return [count(case, code, used) for case in wanted]


# Why a case takes longer to issue than AIM allows; the first whose pattern is found in the case's name.
WHY = {
    "NHWC LRN.pool backward": "an LRN's arithmetic and its halo's, after unpooling into shared memory",
    "NCHW LRN.pool backward": "up to four windows a pixel; codes are compared one by one, in the halo's channels too",
    "bf16 NHWC LRN.pool": "two roots a pixel take 0.85 of the memory's time alone, and pixels at a tile's border twice",
    "NHWC LRN.pool": "the arithmetic of an LRN for half of its bytes; pixels at a tile's border are normalized twice",
    "NCHW LRN.pool": "as in channels_last, and two or four bytes an access in each of two passes",
    "bf16 NCHW .*pool backward": "odd rows begin between words: two pixels take one or two stores",
    "bf16 NCHW LRN": "channels lie a plane apart: two bytes an access",
}


def reason(case: str) -> str:
    """Return why a case takes longer to issue than AIM allows, or an empty string."""
    return next((why for pattern, why in WHY.items() if re.search(pattern, case)), "")


def main() -> None:
    """Print the table, or JSON."""
    rows = count_all(*[each for each in sys.argv[1:] if each != "--json"])
    stock_cases.stand_beside(rows, "CUDA")
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    head = f"{'case':46} {'issue':>6} {'memory':>6} {'ratio':>5} {'copy':>5} {'stock':>6}"
    print(f"{head}  {'kernel (instructions)':58} regs stack filled loads; stores")
    for row in rows:
        ratio, share = row["issue"] / row["memory"], issue_slots.share_of_copy(row["issue"], row["memory"])
        head = f"{row['case']:46} {row['issue'] * 1e6:6.1f} {row['memory'] * 1e6:6.1f} {ratio:5.2f} {share:5.0%}"
        head += f" {row['stock'] * 1e6:6.1f}" if row["stock"] else f" {'-':>6}"
        for kernel in row["kernels"]:
            widths = ["+".join(f"{n}x{width}" for width, n in kernel[key]) for key in ("loads", "stores")]
            name = f"{kernel['kernel']} ({kernel['instructions']:.0f})"
            print(
                f"{head:79}  {name:58} {kernel['registers']:4} {kernel['stack']:5} {kernel['occupancy']:6.0%} "
                f"{widths[0]}; {widths[1]}"
            )
            head = ""
        if ratio > issue_slots.AIM:
            print(f"{'':46} because: {reason(row['case'])}")
        if row["more"]:
            print(f"{'':46} more than stock's: {row['more']}")
    print("issue, memory: µs in which an H200 issues the instructions, and moves each tensor once; copy: the smaller")
    print(
        "ceiling as a share of the copy bandwidth; stock: the issue time of its kernels for that; filled: occupancy by"
    )
    print("registers, and by the tile of a block that has one; loads; stores: how many the code has, of so many bytes")


if __name__ == "__main__":
    main()
