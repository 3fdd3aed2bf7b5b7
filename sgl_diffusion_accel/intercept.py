"""Calls of one module instance pass through handlers, whatever is done to its `forward` before or after.

An intercepted instance gets a class of its own kind: a subclass of its class, with the same name, that overrides
`__call__`. So the handler is outermost: hooks, offloading, adapters and compiled code all run inside it. There is one
such subclass for each original class, shared by all intercepted instances and kept for the life of the process, so
that `torch.compile` sees one type for all the blocks of a model and recompiles nothing when a patch is applied again.

Other methods are intercepted in the same way, and not by an attribute on the instance: pipelines copy their schedulers,
and a copy with such an attribute would go on to call the original.
"""

from __future__ import annotations

import copyreg
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import decorators

from sgl_diffusion_accel.cache_contexts import listening_cache_context
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.slots import (
    ASIDE,
    BASE,
    CALL,
    SLOT,
    Handler,
    Instead,
    Slot,
    With,
    base_of,
    original_class,
    slot_of,
)

_REASON = (
    "sgl_diffusion_accel decides at each step whether this block runs, which one graph of the whole transformer cannot "
    "hold. Compile the blocks instead: pipe.transformer.compile_repeated_blocks(fullgraph=True). To export the model, "
    "type: remove(pipe), export it, and apply the patch again"
)


_disable: Any = torch.compiler.disable
# Private to torch; without it the public decorator does the same, for a call more.
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

    Those that stand aside in this thread are none of them.

    Raises:
        UnsupportedModelError: The model is being exported, and a handler would leave its decision in the graph.
    """
    stands_aside = ASIDE.stands
    if stands_aside is not None:
        handlers = tuple(handler for handler in handlers if not stands_aside(module, handler))
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


# Handlers stay out of the graph with all that they call. `_run` alone is skipped, so that the module between them is
# still compiled.
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
    if type(token) is With:
        args, kwargs, token = token.args, token.kwargs, token.token
    # Tens of blocks a call are given other arguments and no more: the end of each would cost the host a microsecond.
    if getattr(handler, "only_enters", False):
        return _run(module, handlers[1:], call, args, kwargs)
    try:
        output = _run(module, handlers[1:], call, args, kwargs)
    # Interrupts as well: a run that was stopped must not go on with what it had kept.
    except BaseException:
        _fail(handler, module, token)
        raise
    return _leave(handler, module, token, output)


_run = eager(_run)


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
    try:
        _settle(module, slot)
    except TypeError:  # an instance whose class cannot be changed
        release(module, kind, method)
        raise


def release(module: object, kind: str, method: str = CALL) -> None:
    """Takes a handler away again; with the last one the module gets its own class back. Harmless when repeated."""
    slot = slot_of(module)
    if slot is None:
        return
    slot.put(kind, None, method)
    _settle(module, slot)
    if not slot:
        module.__dict__.pop(SLOT, None)


def _settle(module: Any, slot: Slot) -> None:
    """Gives a module the class that its handlers need, without any its own."""
    present = type(module)
    base = original_class(module)
    if base is present and any(map(base_of, present.__mro__)):
        return  # something else has put a class of its own on top, which calls the handlers: leave it
    wanted = _intercepted_class(base, frozenset(slot.methods)) if slot else base
    if wanted is not present:
        _CLASS.__set__(module, wanted)


# The true class, past the property that our own classes have under this name.
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
# Reentrant: a run that ends takes its handlers away, and it ends where Python happens to let an object go.
_lock = threading.RLock()


def _intercepted_class(base: type, methods: frozenset[str]) -> Any:
    with _lock:
        made = _classes.get((id(base), methods))
        if made is None:
            made = _classes[id(base), methods] = _make_class(base, methods)
        return made


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
        BASE: base,
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
        namespace["cache_context"] = listening_cache_context(base)
    if hasattr(base, "enable_cache"):
        namespace["enable_cache"] = _forbidden_enable_cache(base)
    # diffusers looks classes up in lists and dicts, in `from_pipe` for example: there it must find the original. What
    # others derive from this class is no such stand-in.
    equality = {
        "__eq__": lambda cls, other: cls is other or (other is base and base_of(cls) is base),
        "__hash__": lambda cls: hash(base) if base_of(cls) is base else type.__hash__(cls),
    }
    return type(type(base).__name__, (type(base),), equality)(base.__name__, (base,), namespace)


def _intercepted_call(base: Any) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot = self.__dict__.get(SLOT)
        if slot is None:
            return base.__call__(self, *args, **kwargs)
        # In front of all else: tens of blocks of a skipped step come by here, and each Python call more costs the host.
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
