"""Calls of one module instance pass through handlers, whatever is done to its `forward` before or after.

An intercepted instance gets a class of its own kind: a subclass of its class, with the same name, that overrides
`__call__`. So the handler is outermost: hooks, offloading, adapters and compiled code all run inside it. There is one
such subclass for each original class, shared by all intercepted instances and kept for the life of the process, so
that `torch.compile` sees one type for all the blocks of a model and recompiles nothing when a patch is applied again.

Other methods are intercepted in the same way, and not by an attribute on the instance: pipelines copy their schedulers,
and a copy with such an attribute would go on to call the original.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn
from torch._dynamo import decorators

from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.frames import Place, entering, frames_from, key_of

SLOT = "_sgl_diffusion_accel"
"""Key in the instance's `__dict__` under which the handlers of an intercepted module live."""

CALL = "__call__"
"""The method that is intercepted unless another one is named."""


class Instead:
    """Returned by `Handler.enter` when the module must not run: the caller gets `output` as it is."""

    __slots__ = ("output",)

    def __init__(self, output: Any) -> None:
        self.output = output


class Handler(Protocol):
    """Stands between the caller of a module and the module.

    The parts are separate, and not one function around the module, so that `torch.compile` of a whole transformer can
    leave them out and still compile the module between them.
    """

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """Runs before the module. Returns `Instead(output)` to answer in its place, else a token for the other two."""

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


class Slot:
    """The handlers of one module, by kind; the one applied last is outermost.

    Attributes:
        kinds: Those of its `__call__`, the one applied last at the end.
        handlers: The same, outermost first. Those that only watch (`is_watching`) are in front of all others, whenever
            they came: an answer that another one gives in the module's place is seen by them as well.
        detour: Of the only handler; None where there are others, which have to see each call.
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
        self.kinds.pop(kind, None)
        if handler is not None:
            self.kinds[kind] = handler
        applied = sorted(self.kinds.values(), key=lambda each: bool(getattr(each, "is_watching", False)))
        self.handlers = tuple(reversed(applied))
        self.detour = getattr(applied[0], "detour", None) if len(applied) == 1 else None

    def of(self, method: str) -> tuple[Handler, ...]:
        """The handlers of a method, outermost first."""
        slot = self if method == CALL else self.methods.get(method)
        return slot.handlers if slot is not None else ()


_REASON = (
    "sgl_diffusion_accel decides at each step whether this block runs, which one graph of the whole transformer cannot "
    "hold. Compile the blocks instead: pipe.transformer.compile_repeated_blocks(fullgraph=True). To export the model, "
    "type: remove(pipe), export it, and apply the patch again"
)


_disable: Any = torch.compiler.disable
_skip: Any = getattr(decorators, "skip", functools.partial(_disable, recursive=False))


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps `torch.compile` of a whole transformer out of a function and of what it calls."""
    wrapped: Callable[..., Any] = _disable(function, reason=_REASON)
    return wrapped


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps `torch.compile` of a whole transformer out of a function, but not of what it calls.

    It marks the function's code and puts nothing around it: `torch.compiler.disable` costs a call more each time.
    """
    made: Any = _skip(function)
    made._torchdynamo_disable_msg = _REASON
    return made  # type: ignore[no-any-return]


_jit: Any = torch.jit  # its `is_tracing` is public and has no types


def _acting(module: nn.Module, handlers: tuple[Handler, ...]) -> tuple[Handler, ...]:
    """The handlers that may act on a call: while a model is being exported none but watchers could, and they need not.

    Raises:
        UnsupportedModelError: The model is being exported, and a handler would leave its decision in the graph.
    """
    if not (torch.compiler.is_exporting() or _jit.is_tracing()):
        return handlers
    if all(getattr(handler, "is_watching", False) for handler in handlers):
        return ()
    raise UnsupportedModelError(
        f"{original_class(module).__name__} is patched by sgl_diffusion_accel, and is being exported or traced: the "
        "graph would hold what the patch decides now, for ever. Type: remove(pipe), export the model, and apply the "
        "patch again."
    )


_acting = eager(_acting)


_enter = _eager(lambda handler, *rest: handler.enter(*rest))
_leave = _eager(lambda handler, *rest: handler.leave(*rest))
_fail = _eager(lambda handler, *rest: handler.fail(*rest))


def _run(
    module: nn.Module,
    handlers: tuple[Handler, ...],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs `call(module, *args, **kwargs)` inside its handlers, the first of them outermost."""
    if not handlers:
        return call(module, *args, **kwargs)
    handler = handlers[0]
    token = _enter(handler, module, args, kwargs)
    if type(token) is Instead:
        return token.output
    try:
        output = _run(module, handlers[1:], call, args, kwargs)
    except BaseException:
        _fail(handler, module, token)
        raise
    return _leave(handler, module, token, output)


_run = eager(_run)


class _CacheContext:
    """A cache context that a pipeline, or a loop of one's own, has entered."""

    def __init__(self, module: nn.Module, name: str, details: dict[str, Any], place: Place) -> None:
        self.module, self.name, self.details, self.place = module, name, details, place

    def is_around_here(self) -> bool:
        """Whether it is around the present call: a generator may have stopped inside of it."""
        return not self.place.may_stop or any(key_of(each) == self.place.key for each in frames_from(sys._getframe(2)))


# By context and not by thread: tasks take turns in one.
_contexts: ContextVar[tuple[_CacheContext, ...]] = ContextVar("cache_contexts", default=())


def cache_context_of(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Tells the cache context that the running pipeline has set on an intercepted module.

    Returns:
        The context's name, such as `"cond"`, and its details (`step_index`, …), or None outside of any.
    """
    for each in reversed(_contexts.get()):
        if each.module is module and each.is_around_here():
            return each.name, each.details
    return None


def intercept(module: object, kind: str, handler: Handler, method: str = CALL) -> None:
    """Puts a handler in front of a module instance.

    Args:
        module: The instance, or one of another class: a pipeline, a scheduler. Its class and all other instances stay
            as they are.
        kind: Name under which the handler can be released. One handler of a kind at a time.
        handler: Called instead of the module.
        method: Called instead of this method.
    """
    slot = slot_of(module)
    if slot is None:
        slot = Slot()
        object.__setattr__(module, SLOT, slot)
    slot.put(kind, handler, method)
    _settle(module, slot)


def release(module: object, kind: str, method: str = CALL) -> None:
    """Takes a handler away again; with the last one the module gets its own class back. Harmless when repeated."""
    slot = slot_of(module)
    if slot is None:
        return
    slot.put(kind, None, method)
    _settle(module, slot)
    if not slot:
        module.__dict__.pop(SLOT, None)


def original_class(module: object) -> type:
    """The class of an object as it is without interception."""
    return _base_of(type(module)) or type(module)


def slot_of(module: object) -> Slot | None:
    """Returns the handlers of a module, None if it is not intercepted."""
    slot = module.__dict__.get(SLOT)
    return slot if isinstance(slot, Slot) else None


def _settle(module: Any, slot: Slot) -> None:
    """Gives a module the class that its handlers need, without any its own."""
    present = type(module)
    base = original_class(module)
    if base is present and any(map(_base_of, present.__mro__)):
        return  # something else has put a class of its own on top, which calls the handlers: leave it
    wanted = _intercepted_class(base, frozenset(slot.methods)) if slot else base
    if wanted is not present:
        _CLASS.__set__(module, wanted)


_CLASS: Any = vars(object)["__class__"]


def _assign_class(module: Any, wanted: type) -> None:
    """Gives an intercepted module another class of its own, with the handlers in front of it again."""
    _CLASS.__set__(module, wanted)
    slot = slot_of(module)
    if slot is not None:
        _settle(module, slot)


# Frameworks that mix something into an instance's class read `module.__class__`, make a class of it that they keep in a
# table, and assign that: PyTorch's `fully_shard` does. They are to see and to keep the original, and the class that
# they assign, which knows nothing of handlers, is to be intercepted in its turn.
_PUBLIC_CLASS = property(original_class, _assign_class)


# Not by the classes themselves: a class that is made compares equal to its original.
_classes: dict[tuple[int, frozenset[str]], Any] = {}
_BASE = "_sgl_diffusion_accel_original"
_lock = threading.Lock()


def _intercepted_class(base: type, methods: frozenset[str]) -> Any:
    with _lock:
        made = _classes.get((id(base), methods))
        if made is None:
            made = _classes[id(base), methods] = _make_class(base, methods)
        return made


def _base_of(cls: type) -> type | None:
    """What an intercepted class was made of, None for any other class."""
    base: type | None = vars(cls).get(_BASE)
    return base


def _make_class(base: Any, methods: frozenset[str]) -> Any:
    def __getstate__(self: nn.Module) -> Any:
        state = base.__getstate__(self) if hasattr(base, "__getstate__") else self.__dict__
        return {key: value for key, value in state.items() if key != SLOT}

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # A copy or a pickle is a copy of the module itself: unpatched, of the original class.
        function, arguments, *rest = base.__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle wants the object's own class there
            function, arguments = copyreg._reconstructor, (base, object, None)  # type: ignore[attr-defined]
        own = type(self)
        return (base if function is own else function, tuple(base if a is own else a for a in arguments), *rest)

    namespace: dict[str, Any] = {
        _BASE: base,
        "__class__": _PUBLIC_CLASS,
        "__getstate__": __getstate__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if issubclass(base, nn.Module):
        namespace[CALL] = _intercepted_call(base)
        namespace["_replicate_for_data_parallel"] = _refuse_to_replicate
    elif any(CALL in vars(each) for each in base.__mro__):  # hasattr would find that of the class's own class
        namespace[CALL] = _intercepted_method(base, CALL)
    namespace |= {name: _intercepted_method(base, name) for name in methods}
    if hasattr(base, "cache_context"):
        namespace["cache_context"] = _listening_cache_context(base)
    if hasattr(base, "enable_cache"):
        namespace["enable_cache"] = _forbidden_enable_cache(base)
    # diffusers looks classes up in lists and dicts, in `from_pipe` for example: there it must find the original. What
    # others derive from this class is no such stand-in.
    equality = {
        "__eq__": lambda cls, other: cls is other or (other is base and _base_of(cls) is base),
        "__hash__": lambda cls: hash(base) if _base_of(cls) is base else type.__hash__(cls),
    }
    return type(type(base).__name__, (type(base),), equality)(base.__name__, (base,), namespace)


def _intercepted_call(base: Any) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot = self.__dict__.get(SLOT)
        if slot is None:
            return base.__call__(self, *args, **kwargs)
        detour = slot.detour
        if detour is not None:
            answer = detour.answer
            if answer is not None:
                detour.taken += 1
                return answer(args, kwargs)
        handlers = _acting(self, slot.handlers) if slot.handlers else ()
        return _run(self, handlers, base.__call__, args, kwargs) if handlers else base.__call__(self, *args, **kwargs)

    return eager(__call__)


def _refuse_to_replicate(self: nn.Module) -> Any:
    raise UnsupportedModelError(
        f"torch.nn.DataParallel copies {type(self).__name__} to several devices at every call, and patches of "
        "sgl_diffusion_accel cannot follow the copies. Type: remove(pipe). Or use "
        "torch.nn.parallel.DistributedDataParallel, before or after patching."
    )


def _intercepted_method(base: Any, name: str) -> Callable[..., Any]:
    original = getattr(base, name)

    @functools.wraps(original)  # pipelines look at the parameters of a scheduler's step
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        slot = self.__dict__.get(SLOT)
        return _run(self, slot.of(name) if slot else (), original, args, kwargs)

    return eager(method)


def _forbidden_enable_cache(base: Any) -> Callable[..., Any]:
    def enable_cache(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot = self.__dict__.get(SLOT)
        for handler in slot.handlers if slot else ():
            if getattr(handler, "forbids_enable_cache", None):
                raise UnsupportedModelError(handler.forbids_enable_cache)
        return base.enable_cache(self, *args, **kwargs)

    enable_cache.__doc__ = base.enable_cache.__doc__
    return enable_cache


def _listening_cache_context(base: Any) -> Callable[..., Any]:
    @contextlib.contextmanager
    def cache_context(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        entry = _CacheContext(self, name, kwargs, entering())
        _contexts.set((*_contexts.get(), entry))
        try:
            with base.cache_context(self, name, *args, **kwargs) as entered:
                yield entered
        finally:
            _contexts.set(tuple(each for each in _contexts.get() if each is not entry))

    cache_context.__doc__ = base.cache_context.__doc__
    return cache_context
