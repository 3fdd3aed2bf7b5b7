"""Calls of one module instance pass through handlers, whatever is done to its `forward` before or after.

An intercepted instance gets a class of its own kind: a subclass of its class, with the same name, that overrides
`__call__`. So the handler is outermost: hooks, offloading, adapters and compiled code all run inside it. There is one
such subclass for each original class, shared by all intercepted instances and kept for the life of the process, so
that `torch.compile` sees one type for all the blocks of a model and recompiles nothing when a patch is applied again.
"""

from __future__ import annotations

import contextlib
import copyreg
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from sgl_diffusion_accel.errors import UnsupportedModelError

SLOT = "_sgl_diffusion_accel"
"""Key in the instance's `__dict__` under which the handlers of an intercepted module live."""


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
    """The handlers of one module, by kind; the one applied last is outermost."""

    __slots__ = ("handlers", "kinds")

    def __init__(self) -> None:
        self.kinds: dict[str, Handler] = {}
        self.handlers: tuple[Handler, ...] = ()

    def put(self, kind: str, handler: Handler | None) -> None:
        """Sets the handler of a kind, or takes it out with None."""
        self.kinds.pop(kind, None)
        if handler is not None:
            self.kinds[kind] = handler
        self.handlers = tuple(reversed(self.kinds.values()))


_REASON = (
    "sgl_diffusion_accel decides at each step whether this block runs, which one graph of the whole transformer cannot "
    "hold. Compile the blocks instead: pipe.transformer.compile_repeated_blocks(fullgraph=True)"
)


def _eager(function: Callable[..., Any], recursive: bool = True) -> Callable[..., Any]:
    """Keeps `torch.compile` of a whole transformer out of a function and, if recursive, of what it calls."""
    disable: Any = torch.compiler.disable
    reason = {"reason": _REASON} if "reason" in inspect.signature(disable).parameters else {}  # torch 2.7 and newer
    wrapped: Callable[..., Any] = disable(function, recursive=recursive, **reason)
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


def intercept(module: nn.Module, kind: str, handler: Handler) -> None:
    """Puts a handler in front of a module instance.

    Args:
        module: The instance; its class and all other instances stay as they are.
        kind: Name under which the handler can be released. One handler of a kind at a time.
        handler: Called instead of the module.
    """
    slot = slot_of(module)
    if slot is None:
        slot = Slot()
        object.__setattr__(module, SLOT, slot)
        object.__setattr__(module, "__class__", _intercepted_class(type(module)))
    slot.put(kind, handler)


def release(module: nn.Module, kind: str) -> None:
    """Takes a handler away again; with the last one the module gets its own class back. Harmless when repeated."""
    slot = slot_of(module)
    if slot is None:
        return
    slot.put(kind, None)
    if not slot.handlers:
        base = type(module).__mro__[1]
        if _classes.get(base) is type(module):  # else something else has put a class of its own on top: leave it
            object.__setattr__(module, "__class__", base)
        module.__dict__.pop(SLOT, None)


def slot_of(module: nn.Module) -> Slot | None:
    """Returns the handlers of a module, None if it is not intercepted."""
    slot = module.__dict__.get(SLOT)
    return slot if isinstance(slot, Slot) else None


_classes: dict[type[nn.Module], Any] = {}
_lock = threading.Lock()


def _intercepted_class(base: type[nn.Module]) -> Any:
    with _lock:
        made = _classes.get(base)
        if made is None:
            made = _classes[base] = _make_class(base)
        return made


def _make_class(base: Any) -> Any:
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
        "__call__": _eager(__call__, recursive=False),
        "__getstate__": __getstate__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "cache_context"):
        namespace["cache_context"] = _listening_cache_context(base)
    if hasattr(base, "enable_cache"):
        namespace["enable_cache"] = _forbidden_enable_cache(base)
    # diffusers looks classes up in lists and dicts, in `from_pipe` for example: there it must find the original.
    equality = {"__eq__": lambda cls, other: cls is other or other is base, "__hash__": lambda _: hash(base)}
    return type(type(base).__name__, (type(base),), equality)(base.__name__, (base,), namespace)


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
