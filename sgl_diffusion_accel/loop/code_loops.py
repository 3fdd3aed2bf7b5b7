"""Which loops of a function are around the instruction that it is at, and what they run over: read from its bytecode.

A frame tells the values of its variables, and not which of them a loop is counting. The compiled code does: each `for`
is a `FOR_ITER` that stores its targets, and what it runs over was put together just before.
"""

from __future__ import annotations

import dis
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import CodeType

_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
_GOES_ON = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")  # and nowhere else
_HANDLERS = ("SETUP_",)  # Python 3.10: where an exception goes, which is no path of the loop
_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD")
_STORES = ("STORE_FAST", "STORE_DEREF", "STORE_NAME", "STORE_GLOBAL")


@dataclass(frozen=True)
class CodeLoop:
    """A loop of a function.

    Attributes:
        targets: Variables that a `for` sets at each turn, in order; empty for a `while`.
        stored: All variables that are set inside of it, the targets included.
        fresh: Those that are set in each turn before the instruction that was asked about, whichever way it is reached;
            what the others hold may be from an earlier turn.
        names: Variables, attributes and functions that its iterable is made from.
        is_plain: Whether the iterable holds no number and no slice, so that it begins where what it names begins.
        left_off: How many of the timesteps it leaves off at their end, as in `timesteps[:-1]`.
    """

    targets: tuple[str, ...]
    stored: frozenset[str]
    fresh: frozenset[str]
    names: frozenset[str]
    is_plain: bool
    left_off: int = 0


_MOST_KNOWN = 1024
# The code is kept beside what is known of it, so that no other code gets its identity.
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


_known_names: dict[int, tuple[CodeType, frozenset[str]]] = {}


def sets(code: CodeType, name: str) -> bool:
    """Whether a function sets a variable anywhere; an argument that it does not set is what its caller gave."""
    known = _known_names.get(id(code))
    if known is None:
        if len(_known_names) >= _MOST_KNOWN:
            _known_names.clear()
        names = frozenset(each for one in dis.get_instructions(code) for each in _stored_by(one))
        known = _known_names[id(code)] = (code, names)
    return name in known[1]


def _loops_around(code: CodeType, offset: int) -> tuple[CodeLoop, ...] | None:
    graph = _graph(code)
    # A call that is under way is told by an offset within its instruction, since Python 3.11 behind its start.
    index = max((i for i, each in enumerate(graph.instructions) if each.offset <= offset), default=0)
    if index not in graph.reached:
        return None
    around = sorted(
        (head for head, body in graph.loops.items() if index in body), key=lambda head: len(graph.loops[head])
    )
    return tuple(_loop(graph, head, index) for head in around)


@dataclass(frozen=True)
class _Graph:
    """The ways through a function.

    Attributes:
        instructions: Its bytecode.
        following: Where each instruction may go on to, but for exceptions, by index.
        reached: Instructions that are reached without an exception.
        loops: The first instruction of each loop to all of its instructions.
    """

    instructions: list[dis.Instruction]
    following: list[list[int]]
    reached: set[int]
    loops: dict[int, set[int]]


def _graph(code: CodeType) -> _Graph:
    instructions = list(dis.get_instructions(code))
    at = {each.offset: index for index, each in enumerate(instructions)}
    following = [list(_successors(instructions, index, at)) for index in range(len(instructions))]
    reached = _reachable(following, 0)
    ends: dict[int, set[int]] = {}  # head of each loop to where it is jumped back from
    for index in reached:
        for successor in following[index]:
            # The compiler puts the head of a loop in front of its body: a jump back makes a loop, of `for` and `while`
            # alike.
            if successor <= index:
                ends.setdefault(successor, set()).add(index)
    loops = {head: _body(head, tails, following, reached) for head, tails in ends.items()}
    return _Graph(instructions, following, reached, loops)


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


def _reachable(following: list[list[int]], start: int, without: Collection[int] = ()) -> set[int]:
    """What is reached from an instruction, on ways that lead over none of some others."""
    reached, waiting = set(), [start]
    while waiting:
        index = waiting.pop()
        if index not in reached and index not in without:
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


def _loop(graph: _Graph, head: int, index: int) -> CodeLoop:
    """What is to be known of a loop, for an instruction in it."""
    instructions, body, begin = graph.instructions, graph.loops[head], head
    while instructions[begin].opname == "EXTENDED_ARG":  # of a body that is long: the jump goes to this prefix
        begin += 1
    is_for = instructions[begin].opname == "FOR_ITER"
    targets = tuple(_targets(instructions, begin + 1)) if is_for else ()
    stores: dict[str, set[int]] = {}
    for each in body:
        for name in _stored_by(instructions[each]):
            stores.setdefault(name, set()).add(each)
    # Ways within one turn, never through the head again: what was set before it is of an earlier turn. A variable is
    # fresh only if no way to the instruction leads around all places that set it; one set under an `if` is not.
    within = [[after for after in following if after in body and after != head] for following in graph.following]
    fresh = {name for name, where in stores.items() if index not in _reachable(within, head, where)}
    iterable = _iterable(instructions, begin) if is_for else []
    names = {str(one.argval) for one in iterable if one.opname.startswith(_LOADS)}
    # `timesteps[1:]` and `enumerate(timesteps, 1)` do not count from the first step.
    is_plain = not any(
        "SLICE" in one.opname or (one.opname.startswith("LOAD_CONST") and isinstance(one.argval, (int, slice)))
        for one in iterable
    )
    is_plain = is_plain and bool(iterable)
    return CodeLoop(targets, frozenset(stores), frozenset(fresh), frozenset(names), is_plain, _left_off(iterable[::-1]))


def _left_off(iterable: list[dis.Instruction]) -> int:
    """How many of the timesteps are cut off at the end by a slice that is written out: `timesteps[:-1]`."""
    values = [one for one in iterable if one.opname.startswith((*_LOADS, "LOAD_CONST", "BUILD_SLICE", "BINARY_"))]
    for index, one in enumerate(values):
        if not one.opname.startswith(_LOADS) or one.argval != "timesteps":
            continue
        cuts = [each.argval for each in values[index + 1 : index + 4]]
        slices = "SLICE" in "".join(each.opname for each in values[index + 1 : index + 4])
        if cuts and isinstance(cuts[0], slice):  # Python 3.14 has it as one constant
            cuts, slices = [cuts[0].start, cuts[0].stop], cuts[0].step is None
        is_end = slices and len(cuts) > 1 and cuts[0] in (None, 0) and type(cuts[1]) is int and cuts[1] < 0
        if is_end:
            return -int(cuts[1])
    return 0


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
        # Backwards, until what was found leaves one value on the stack: the iterable. `stack_effect` refuses an
        # argument for an opcode that takes none.
        has_argument = one.opcode >= dis.HAVE_ARGUMENT
        made += dis.stack_effect(one.opcode, one.arg if has_argument else None)
        found.append(one)
    return found
