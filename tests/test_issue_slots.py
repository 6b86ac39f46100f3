"""Counting what a kernel asks of the issue slots, on listings as cuobjdump writes them."""

import issue_slots
import pytest

LISTING = """
	Function : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.RSQ R5, R5 ;
        /*0030*/                   FADD R6, R6, R5 ;
        /*0040*/              @P0  BRA 0x30 ;
        /*0050*/             @!P1  LDG.E.U16 R7, desc[UR4][R2.64] ;
        /*0060*/              @P1  BRA 0x20 ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0080*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   FADD R6, R6, R5 ;
	Function : second
        /*0000*/                   EXIT ;
"""


def code() -> issue_slots.Code:
    return dict(issue_slots.functions(LISTING))["first"]


def test_functions_and_their_bodies() -> None:
    assert [name for name, _ in issue_slots.functions(LISTING)] == ["first", "second"]
    assert len(issue_slots.body(code())) == 10  # what follows the endless branch is called, if at all


def test_inner_loops_come_before_outer_ones() -> None:
    assert issue_slots.loops(issue_slots.body(code())) == [(0x30, 0x40), (0x20, 0x60)]


def test_work_multiplies_the_passes_of_loops_that_hold_each_other() -> None:
    once = issue_slots.work(code(), ())
    assert (once.instructions, once.transcendental) == (10, 1)
    often = issue_slots.work(code(), (3, 2))
    assert often.instructions == 2 + 3 + 2 * 3 + 2 * 3 * 2  # before, after, the outer loop alone, the inner one
    assert often.transcendental == 2
    assert often.clocks == often.instructions
    assert issue_slots.Work(10, 2).clocks == 16


WAYS = """
	Function : ways
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0  BRA 0x60 ;
        /*0020*/                   FADD R6, R6, R5 ;
        /*0030*/              @P1  BRA 0x20 ;
        /*0040*/                   MUFU.RCP R6, R6 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   FADD R6, R6, R5 ;
        /*0070*/              @P2  EXIT ;
        /*0080*/              @P3  BRA 0xb0 ;
        /*0090*/                   CALL.REL.NOINC 0xd0 ;
        /*00a0*/                   FADD R6, R6, R5 ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   RET.REL.NODEC R6 0x0 ;
"""


@pytest.mark.parametrize(
    ("branches", "instructions", "transcendental"),
    [
        ((0, 5), 2 + 5 * 2 + 2 + 2 + 2, 1),  # through the loop, and around the call
        ((1,), 2 + 1 + 2 + 2, 0),
        ((0.75, 8), 2 + 0.25 * (8 * 2 + 2) + 0.75 + 2 + 2, 0.25),
        ((0, ...), 2 + 2, 0),
    ],
)
def test_follow_takes_the_way_that_is_said(
    branches: tuple[float, ...], instructions: float, transcendental: float
) -> None:
    code = dict(issue_slots.functions(WAYS))["ways"]
    assert issue_slots.work_on_way(code, branches) == (instructions, transcendental)


@pytest.mark.parametrize("branches", [(), (0,), (1, 1), (0, 5, 1)])
def test_follow_asks_for_an_entry_of_each_branch(branches: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="branch"):
        issue_slots.follow(dict(issue_slots.functions(WAYS))["ways"], branches)


def test_widths_of_loads_and_stores() -> None:
    assert issue_slots.widths(code(), "LDG") == {16: 1, 2: 1}
    assert issue_slots.widths(code(), "STG") == {8: 1, 4: 1}


def test_share_of_copy() -> None:
    assert issue_slots.share_of_copy(issue=1.0, memory=2.0) == 1.0
    assert issue_slots.share_of_copy(issue=2.0, memory=1.0) == 0.5
    assert issue_slots.budget(1024) == pytest.approx(0.8 * 220, rel=0.01)
