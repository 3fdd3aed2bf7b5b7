"""What is in front of a module's calls: its handlers, kept on the instance, and the short way past it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

SLOT = "_sgl_diffusion_accel"
"""Key in the instance's `__dict__` under which the handlers of an intercepted module live."""

CALL = "__call__"
"""The method that is intercepted unless another one is named."""


class Instead:
    """Returned by `Handler.enter` when the module must not run: the caller gets `output` as it is."""

    __slots__ = ("output",)

    def __init__(self, output: Any) -> None:
        self.output = output


class With:
    """Returned by `Handler.enter` when the module is to run on other arguments than its caller gave.

    Attributes:
        args: Positional arguments that the handlers further inside, and the module, get.
        kwargs: Keyword arguments.
        token: For the handler's `leave` and `fail`.
    """

    __slots__ = ("args", "kwargs", "token")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], token: Any = None) -> None:
        self.args = args
        self.kwargs = kwargs
        self.token = token


class Handler(Protocol):
    """Stands between the caller of a module and the module.

    One that has `only_enters` set to True is called before the module alone: its `leave` and `fail` do nothing.

    The parts are separate, and not one function around the module, so that `torch.compile` of a whole transformer can
    leave them out and still compile the module between them.
    """

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """Runs before the module. Returns `Instead(output)` to answer in its place, else a token for the other two.

        `With(args, kwargs, token)` gives the token, and other arguments to the module.
        """

    def leave(self, module: nn.Module, token: Any, output: Any, /) -> Any:
        """Runs after the module and returns what its caller gets."""

    def fail(self, module: nn.Module, token: Any, /) -> None:
        """Runs when the module raised, before the error goes on to its caller."""


class Detour(threading.local):
    """The short way past a module, while a handler has decided that it will not run.

    A block cache decides once for tens of blocks. Sending each of them through its handlers to hear the same answer
    costs more host time than a skipped step may take, so while `answer` is set its modules give that at once.

    Attributes:
        answer: Makes what the caller gets from the positional and the keyword arguments; None while there is no detour.
            It runs inside of `torch.compile`'s regions: it calls no Python function that is not `eager`.
        taken: How many calls have taken it since it was opened.
    """

    answer: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    taken: int = 0

    def open(self, answer: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """From now on calls in this thread take it."""
        self.answer, self.taken = answer, 0

    def close(self) -> None:
        """From now on they go through the handlers again."""
        self.answer, self.taken = None, 0


class Aside(threading.local):
    """Which handlers stand aside in this thread, while a model is called for comparison.

    They stay where they are, for calls of other threads, and so that a patch can be removed or applied meanwhile.

    Attributes:
        stands: Tells of a module and its handler whether that stands aside; None where none does.
    """

    stands: Callable[[nn.Module, Handler], bool] | None = None


ASIDE = Aside()


class Slot:
    """The handlers of one module, by kind; the one applied last is outermost.

    Attributes:
        kinds: Those of its `__call__`, the one applied last at the end.
        handlers: The same, outermost first. Those that only watch (`is_watching`) are in front of all others, whenever
            they came: an answer that another one gives in the module's place is seen by them as well. Those that only
            change arguments (`is_inmost`) are behind all others: what finds its place in a loop by the tensors that a
            pipeline passes has to see these. Those that spare the others a call (`is_outer`) come right after the
            watching ones.
        detour: Of the only handler; None where there are others, which have to see each call. One that only changes
            arguments has not: there is nothing for it to do when the module does not run.
        methods: The slots of its other methods, by name.
    """

    __slots__ = ("detour", "handlers", "kinds", "methods")

    def __init__(self) -> None:
        self.kinds: dict[str, Handler] = {}
        self.handlers: tuple[Handler, ...] = ()
        self.detour: Detour | None = None
        self.methods: dict[str, Slot] = {}

    def __bool__(self) -> bool:
        return bool(self.handlers or self.methods)

    def put(self, kind: str, handler: Handler | None, method: str = CALL) -> None:
        """Sets the handler of a kind, or takes it out with None."""
        if method != CALL:
            slot = self.methods.setdefault(method, Slot())
            slot.put(kind, handler)
            if not slot:
                del self.methods[method]
            return
        # Out first, so that a handler that takes another one's place is the newest, and outermost.
        self.kinds.pop(kind, None)
        if handler is not None:
            self.kinds[kind] = handler
        newest_first = list(reversed(self.kinds.values()))
        self.handlers = tuple(sorted(newest_first, key=_from_outside))
        deciding = [each for each in self.handlers if _from_outside(each) != _INMOST]
        self.detour = getattr(deciding[0], "detour", None) if len(deciding) == 1 else None

    def of(self, method: str) -> tuple[Handler, ...]:
        """The handlers of a method, outermost first."""
        slot = self if method == CALL else self.methods.get(method)
        return slot.handlers if slot is not None else ()


_WATCHING, _OUTER, _BETWEEN, _INMOST = range(4)


def _from_outside(handler: Handler) -> int:
    """Where a handler stands, whenever it came."""
    if getattr(handler, "is_watching", False):
        return _WATCHING
    if getattr(handler, "is_outer", False):
        return _OUTER
    return _INMOST if getattr(handler, "is_inmost", False) else _BETWEEN


BASE = "_sgl_diffusion_accel_original"
"""Under this name the class of an intercepted instance keeps the original one."""


def original_class(module: object) -> type:
    """The class of an object as it is without interception."""
    return base_of(type(module)) or type(module)


def slot_of(module: object) -> Slot | None:
    """Returns the handlers of a module, None if it is not intercepted."""
    # Not `getattr`: torch.compile's wrapper hands on the attributes of what it holds.
    slot = module.__dict__.get(SLOT)
    return slot if isinstance(slot, Slot) else None


def base_of(cls: type) -> type | None:
    """What an intercepted class was made of, None for any other class."""
    # Not inherited: a class that others derive from ours stands in for no original.
    base: type | None = vars(cls).get(BASE)
    return base
