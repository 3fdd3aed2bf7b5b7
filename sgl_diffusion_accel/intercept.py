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
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from sgl_diffusion_accel.errors import UnsupportedModelError

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


class Slot:
    """The handlers of one module, by kind; the one applied last is outermost.

    Attributes:
        kinds: Those of its `__call__`, the one applied last at the end.
        handlers: The same, outermost first. Those that only watch (`is_watching`) are in front of all others, whenever
            they came: an answer that another one gives in the module's place is seen by them as well.
        methods: The slots of its other methods, by name.
    """

    __slots__ = ("handlers", "kinds", "methods")

    def __init__(self) -> None:
        self.kinds: dict[str, Handler] = {}
        self.handlers: tuple[Handler, ...] = ()
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

    def of(self, method: str) -> tuple[Handler, ...]:
        """The handlers of a method, outermost first."""
        slot = self if method == CALL else self.methods.get(method)
        return slot.handlers if slot is not None else ()


_REASON = (
    "sgl_diffusion_accel decides at each step whether this block runs, which one graph of the whole transformer cannot "
    "hold. Compile the blocks instead: pipe.transformer.compile_repeated_blocks(fullgraph=True)"
)


def _eager(function: Callable[..., Any], recursive: bool = True) -> Callable[..., Any]:
    """Keeps `torch.compile` of a whole transformer out of a function and, if recursive, of what it calls."""
    disable: Any = torch.compiler.disable
    wrapped: Callable[..., Any] = disable(function, recursive=recursive, reason=_REASON)
    return wrapped


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


_run = _eager(_run, recursive=False)


class _Contexts(threading.local):
    """The cache contexts that this thread has entered, innermost last, as (module, name, details)."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, str, dict[str, Any]]] = []


_contexts = _Contexts()


def cache_context_of(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Tells the cache context that the running pipeline has set on an intercepted module.

    Returns:
        The context's name, such as `"cond"`, and its details (`step_index`, …), or None outside of any.
    """
    for owner, name, details in reversed(_contexts.stack):
        if owner is module:
            return name, details
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
    is_new = slot is None
    if slot is None:
        slot = Slot()
        object.__setattr__(module, SLOT, slot)
    slot.put(kind, handler, method)
    _settle(module, slot, is_new)


def release(module: object, kind: str, method: str = CALL) -> None:
    """Takes a handler away again; with the last one the module gets its own class back. Harmless when repeated."""
    slot = slot_of(module)
    if slot is None:
        return
    slot.put(kind, None, method)
    _settle(module, slot, is_new=False)
    if not slot:
        module.__dict__.pop(SLOT, None)


def slot_of(module: object) -> Slot | None:
    """Returns the handlers of a module, None if it is not intercepted."""
    slot = module.__dict__.get(SLOT)
    return slot if isinstance(slot, Slot) else None


def _settle(module: Any, slot: Slot, is_new: bool) -> None:
    """Gives a module the class that its handlers need, without any its own."""
    present = type(module)
    if not is_new and present not in _bases:
        return  # something else has put a class of its own on top: leave it
    base = _bases.get(present, present)
    wanted = _intercepted_class(base, frozenset(slot.methods)) if slot else base
    if wanted is not present:
        object.__setattr__(module, "__class__", wanted)


_classes: dict[tuple[type, frozenset[str]], Any] = {}
_bases: dict[type, type] = {}
_lock = threading.Lock()


def _intercepted_class(base: type, methods: frozenset[str]) -> Any:
    with _lock:
        made = _classes.get((base, methods))
        if made is None:
            made = _classes[base, methods] = _make_class(base, methods)
            _bases[made] = base
        return made


def _make_class(base: Any, methods: frozenset[str]) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot = self.__dict__.get(SLOT)
        return _run(self, slot.handlers if slot else (), base.__call__, args, kwargs)

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
        "__getstate__": __getstate__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if issubclass(base, nn.Module):
        namespace[CALL] = _eager(__call__, recursive=False)
    elif any(CALL in vars(each) for each in base.__mro__):  # hasattr would find that of the class's own class
        namespace[CALL] = _intercepted_method(base, CALL)
    namespace |= {name: _intercepted_method(base, name) for name in methods}
    if hasattr(base, "cache_context"):
        namespace["cache_context"] = _listening_cache_context(base)
    if hasattr(base, "enable_cache"):
        namespace["enable_cache"] = _forbidden_enable_cache(base)
    # diffusers looks classes up in lists and dicts, in `from_pipe` for example: there it must find the original.
    equality = {"__eq__": lambda cls, other: cls is other or other is base, "__hash__": lambda _: hash(base)}
    return type(type(base).__name__, (type(base),), equality)(base.__name__, (base,), namespace)


def _intercepted_method(base: Any, name: str) -> Callable[..., Any]:
    original = getattr(base, name)

    @functools.wraps(original)  # pipelines look at the parameters of a scheduler's step
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        slot = self.__dict__.get(SLOT)
        return _run(self, slot.of(name) if slot else (), original, args, kwargs)

    return _eager(method, recursive=False)


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
        entry = (self, name, kwargs)
        _contexts.stack.append(entry)
        try:
            with base.cache_context(self, name, *args, **kwargs) as entered:
                yield entered
        finally:
            _contexts.stack.pop()

    cache_context.__doc__ = base.cache_context.__doc__
    return cache_context
