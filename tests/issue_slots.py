"""What a compiled kernel asks of a GPU's issue slots, by its SASS: time that no bandwidth can hide.

    cuobjdump -sass file.cubin > sass.txt && python tests/issue_slots.py sass.txt [part of a kernel's name]

A warp's instruction takes one of four issue slots of a multiprocessor for a clock; a transcendental one takes its unit
for eight. A kernel whose instructions take longer than its bytes cannot reach the memory's bandwidth, however wide its
accesses are. Real kernels issue in about three quarters of the slots, so four fifths of the memory's time are the aim.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from limits import COPY

SLOTS = 132 * 4 * 1.75e9  # an H200's warp-instructions a second
TRANSCENDENTAL = 8  # clocks that one holds its unit for
AIM = 0.8  # of the memory's time
# Reciprocals, roots, exponentials; conversions between integers and floats go to the same unit.
_TRANSCENDENTAL = re.compile(r"(MUFU|I2F|F2I|FRND)\b")
_OPCODE = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))")
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")
_CONDITIONAL = re.compile(r"^@|\bBRA(?:\.\w+)*\s+!?U?P\w+,")
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    text: str

    @property
    def opcode(self) -> str:
        """Return the operation with its modifiers, without a predicate."""
        found = _OPCODE.match(self.text)
        return found[1] if found else ""


Code = list[Instruction]


class Work(NamedTuple):
    """What one warp issues."""

    instructions: float
    transcendental: float

    @property
    def clocks(self) -> float:
        """Return the clocks of an issue slot, or of the transcendental unit where that is the slower."""
        return max(self.instructions, TRANSCENDENTAL * self.transcendental)


def functions(listing: str) -> Iterator[tuple[str, Code]]:
    """Yield name, as it is in the listing, and instructions of each function of ``cuobjdump -sass``."""
    for part in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]:
        name, code = part.split("\n", 1)
        lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", code)
        yield name.strip(), [Instruction(int(address, 16), text.strip()) for address, text in lines]


def body(code: Code) -> Code:
    """Return the instructions up to the endless branch after the last exit: without slow paths, which are calls."""
    for i, each in enumerate(code):
        found = _BRANCH.search(each.text)
        if found and found[1] and int(found[1], 16) == each.address:
            return [one for one in code[:i] if one.opcode != "NOP"]
    return [one for one in code if one.opcode != "NOP"]


def loops(code: Code) -> list[tuple[int, int]]:
    """Return first and last address of each loop, in the order of their ends: an inner one before its outer one."""
    found = {}
    for each in code:
        branch = _BRANCH.search(each.text)
        if branch and branch[1] and int(branch[1], 16) < each.address:
            found[int(branch[1], 16)] = each.address  # several branches back to one place are one loop
    return sorted(found.items(), key=lambda loop: loop[1])


def work(code: Code, passes: Sequence[float]) -> Work:
    """Return what a warp issues where each loop is gone through so often a time that it is reached.

    Args:
        code: of the kernel.
        passes: of each loop, in the order of `loops`; those not given are taken to be one.
    """
    code = body(code)
    held = loops(code)
    passes = [*passes, *[1.0] * len(held)]
    instructions = transcendental = 0.0
    for each in code:
        times = 1.0
        for (first, last), often in zip(held, passes, strict=False):
            times *= often if first <= each.address <= last else 1.0
        instructions += times
        transcendental += times if _TRANSCENDENTAL.match(each.opcode) else 0.0
    return Work(instructions, transcendental)


def follow(code: Code, branches: Sequence[Any]) -> list[float]:
    """Return how often a warp issues each instruction on the way that `branches` say.

    Args:
        code: of the kernel.
        branches: of each conditional branch that is reached, in the order of their addresses: for one ahead, how often
            of a time it is taken; for one back, how often its loop runs. An Ellipsis ends the way there, or at
            an exit before: what comes after is not counted. A branch around a call is taken and needs no entry: calls
            are slow paths of divisions.

    Raises:
        ValueError: there are more or fewer branches than `branches` has: the code is not the one they were read from.
    """
    given = list(branches)
    times, arriving, here = [0.0] * len(code), Counter[int](), 1.0
    for i, each in enumerate(code):
        here += arriving.pop(each.address, 0.0)
        times[i] = here
        found = _BRANCH.search(each.text)
        if here and found and found[1]:
            target = int(found[1], 16)
            around_call = target > each.address and any(one.opcode[:4] == "CALL" for one in code[i + 1 : i + 7])
            if around_call or not _CONDITIONAL.search(each.text):
                share = 1.0
            elif not given:
                raise ValueError(f"no entry for the branch at {each.address:#x}")
            elif (share := given.pop(0)) is ...:
                break
            if target <= each.address:
                times[:] = [n * share if code[j].address >= target else n for j, n in enumerate(times)]
            else:
                arriving[target] += here * share
                here *= 1 - share
        elif each.opcode.split(".")[0] in ("EXIT", "RET"):
            if given == [...]:
                given.clear()
                break
            here *= each.text.startswith("@")
    if given:
        raise ValueError(f"{len(given)} branches too many")
    return times


def work_on_way(code: Code, branches: Sequence[Any]) -> Work:
    """Return what a warp issues on the way that `branches` say, as `follow` takes them."""
    issued = [(each.opcode, n) for each, n in zip(code, follow(code, branches), strict=True) if each.opcode != "NOP"]
    return Work(sum(n for _, n in issued), sum(n for opcode, n in issued if _TRANSCENDENTAL.match(opcode)))


def widths(code: Code, opcode: str) -> Counter[int]:
    """Return how many accesses of each width in bytes a thread has: of `opcode` LDG (loads) or STG (stores)."""
    return Counter(bytes_of(each) for each in body(code) if each.opcode.split(".")[0] in (opcode, f"{opcode}STS"))


def bytes_of(each: Instruction) -> int:
    """Return how many a thread's instruction loads from or stores to global memory."""
    width = _WIDTH.search(each.opcode)
    return (BYTES[width[1]] if width else 4) if each.opcode[:3] in ("LDG", "STG") else 0


def issue_seconds(clocks: float, warps: float) -> float:
    """Return the least time in which an H200 issues what its warps ask for."""
    return clocks * warps / SLOTS


def share_of_copy(issue: float, memory: float) -> float:
    """Return which part of the copy bandwidth is left where issuing takes so many seconds, and the bytes so many."""
    return min(1.0, memory / issue) if issue else 1.0


def budget(bytes_of_a_warp: float) -> float:
    """Return the clocks that a warp may issue for, by `AIM`, to move so many bytes."""
    return AIM * bytes_of_a_warp / COPY * SLOTS


def main() -> None:
    """Print instructions and loops of the kernels in a listing."""
    with open(sys.argv[1]) as file:
        listing = file.read()
    for name, code in functions(listing):
        if len(sys.argv) < 3 or sys.argv[2] in name:
            once = work(code, ())
            print(name, f"{once.instructions:.0f} instructions, {once.transcendental:.0f} transcendental")
            print("  loads", dict(widths(code, "LDG")), "stores", dict(widths(code, "STG")))
            for first, last in loops(body(code)):
                print(f"  loop {first:x} to {last:x}: {sum(first <= each.address <= last for each in body(code))}")


if __name__ == "__main__":
    main()
