"""Which loops of a function are around the instruction that it is at, and what they run over: read from its bytecode.

A frame tells the values of its variables, and not which of them a loop is counting. The compiled code does: each `for`
is a `FOR_ITER` that stores its targets, and what it runs over was put together just before.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
_GOES_ON = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")  # and nowhere else
_HANDLERS = ("SETUP_",)  # Python 3.10: where an exception goes, which is no path of the loop
_STORES = ("STORE_FAST", "STORE_DEREF", "STORE_NAME", "STORE_GLOBAL")


@dataclass(frozen=True)
class CodeLoop:
    """A loop of a function.

    Attributes:
        targets: Variables that a `for` sets at each turn, in order; empty for a `while`.
        stored: All variables that are set inside of it, the targets included.
        names: Variables, attributes and functions that its iterable is made from.
        is_plain: Whether the iterable holds no number and no slice, so that it begins where what it names begins.
        body: Offsets of its instructions.
    """

    targets: tuple[str, ...]
    stored: frozenset[str]
    names: frozenset[str]
    is_plain: bool
    body: frozenset[int]


_MOST_KNOWN = 1024
_known: dict[tuple[int, int], tuple[CodeType, tuple[CodeLoop, ...] | None]] = {}


def loops_around(code: CodeType, offset: int) -> tuple[CodeLoop, ...] | None:
    """The loops of a function that an instruction is in, innermost first.

    Args:
        code: The function's code.
        offset: Of the instruction, a frame's `f_lasti`.

    Returns:
        The loops; None for an instruction that only an exception leads to, of which nothing is known.
    """
    key = (id(code), offset)  # a code object's own hash goes through all of its constants at each look-up
    known = _known.get(key)
    if known is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        known = _known[key] = (code, _loops_around(code, offset))
    return known[1]


def _loops_around(code: CodeType, offset: int) -> tuple[CodeLoop, ...] | None:
    loops, reached = _loops(code)
    # A call that is under way is told by an offset within its instruction, since Python 3.11 behind its start.
    start = max((each for each in reached if each <= offset), default=-1)
    if any(start < each.offset <= offset for each in dis.get_instructions(code)):
        return None
    return tuple(sorted((loop for loop in loops if start in loop.body), key=lambda loop: len(loop.body)))


@functools.lru_cache(maxsize=256)
def _loops(code: CodeType) -> tuple[tuple[CodeLoop, ...], frozenset[int]]:
    """The loops of a function, and the offsets of what is reached without an exception."""
    instructions = list(dis.get_instructions(code))
    at = {each.offset: index for index, each in enumerate(instructions)}
    following = [list(_successors(instructions, index, at)) for index in range(len(instructions))]
    reached = _reachable(following)
    ends: dict[int, set[int]] = {}  # head of each loop to where it is jumped back from
    for index in reached:
        for successor in following[index]:
            if successor <= index:
                ends.setdefault(successor, set()).add(index)
    loops = tuple(_loop(instructions, head, _body(head, tails, following, reached)) for head, tails in ends.items())
    return loops, frozenset(instructions[index].offset for index in reached)


def _successors(instructions: list[dis.Instruction], index: int, at: dict[int, int]) -> Iterator[int]:
    """Where an instruction may go on to, but for exceptions."""
    one = instructions[index]
    if one.opname in _ENDS:
        return
    jumps = one.opcode in dis.hasjrel or one.opcode in dis.hasjabs
    if jumps and not one.opname.startswith(_HANDLERS):
        yield at[one.argval]
    if one.opname not in _GOES_ON and index + 1 < len(instructions):
        yield index + 1


def _reachable(following: list[list[int]]) -> set[int]:
    reached, waiting = set(), [0]
    while waiting:
        index = waiting.pop()
        if index not in reached:
            reached.add(index)
            waiting += following[index]
    return reached


def _body(head: int, tails: set[int], following: list[list[int]], reached: set[int]) -> set[int]:
    """All from which a jump back to the head is reached without passing the head: the natural loop."""
    before: dict[int, list[int]] = {}
    for index in reached:
        for successor in following[index]:
            before.setdefault(successor, []).append(index)
    body, waiting = {head}, list(tails)
    while waiting:
        index = waiting.pop()
        if index not in body:
            body.add(index)
            waiting += before.get(index, [])
    return body


def _loop(instructions: list[dis.Instruction], head: int, body: set[int]) -> CodeLoop:
    is_for = instructions[head].opname == "FOR_ITER"
    targets = tuple(_targets(instructions, head + 1)) if is_for else ()
    stored = {name for index in body for name in _stored_by(instructions[index])}
    iterable = _iterable(instructions, head) if is_for else []
    names = {str(one.argval) for one in iterable if one.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL"))}
    names |= {str(one.argval) for one in iterable if one.opname.startswith(("LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD"))}
    is_plain = not any(
        "SLICE" in one.opname or (one.opname.startswith("LOAD_CONST") and isinstance(one.argval, (int, slice)))
        for one in iterable
    )
    offsets = frozenset(instructions[index].offset for index in body)
    return CodeLoop(targets, frozenset(stored), frozenset(names), is_plain and bool(iterable), offsets)


def _stored_by(one: dis.Instruction) -> tuple[str, ...]:
    if not one.opname.startswith(_STORES):
        return ()
    if isinstance(one.argval, tuple):  # Python 3.13 does two things in one instruction
        return one.argval if one.opname == "STORE_FAST_STORE_FAST" else one.argval[:1]
    return (str(one.argval),)


def _targets(instructions: list[dis.Instruction], index: int) -> Iterator[str]:
    """The variables that a `for` stores what it is given in, nested ones in a row."""
    waiting = 1
    while waiting > 0 and index < len(instructions):
        one = instructions[index]
        if one.opname == "UNPACK_SEQUENCE":
            waiting += int(one.argval) - 1
        elif one.opname.startswith(_STORES):
            names = _stored_by(one)
            yield from names
            waiting -= len(names)
        elif one.opname not in ("EXTENDED_ARG", "CACHE", "NOP"):
            return  # an attribute, an element: nothing that has a name
        index += 1


def _iterable(instructions: list[dis.Instruction], head: int) -> list[dis.Instruction]:
    """The instructions that put together what a `for` runs over; none where they branch."""
    made, index = 0, head - 1
    while index >= 0 and instructions[index].opname != "GET_ITER":
        index -= 1
    found: list[dis.Instruction] = []
    while index > 0 and made < 1:
        index -= 1
        one = instructions[index]
        if one.opcode in dis.hasjrel or one.opcode in dis.hasjabs:
            return []
        has_argument = one.opcode >= dis.HAVE_ARGUMENT
        made += dis.stack_effect(one.opcode, one.arg if has_argument else None)
        found.append(one)
    return found
