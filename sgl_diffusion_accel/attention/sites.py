"""Where a model computes attention, and how its calls are sent elsewhere.

The attention layers of diffusers hand their work to a processor, an object whose `__call__` ends in diffusers'
dispatcher or in PyTorch's `scaled_dot_product_attention`. A redirected processor is a copy of the processor whose class
overrides `__call__` with the same code, in which that one name means something else. So nothing is copied from
diffusers, nothing outside of the layer is touched, and `torch.compile` sees plain functions. Modules
without processors (text encoders of transformers, VAEs) are redirected by a `TorchFunctionMode` around their call.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sgl_diffusion_accel.attention.redirect import LAYER, Redirect

_DISPATCHER, _SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"


@dataclass(frozen=True)
class Site:
    """One attention layer with a processor.

    Attributes:
        name: Path of the layer in its component.
        layer: The layer.
        processor: Its processor.
        can_redirect: Whether the processor uses an attention function that can be exchanged.
    """

    name: str
    layer: nn.Module
    processor: Any
    can_redirect: bool

    @property
    def why_not(self) -> str:
        """Why it cannot be redirected."""
        kind = type(self.processor).__name__
        if "linear" in f"{kind} {type(self.layer).__name__}".lower():
            return f"{kind} is linear attention, which has no softmax"
        return f"{kind} computes attention by itself, without PyTorch's function for it"


def find_sites(module: nn.Module) -> Iterator[Site]:
    """Yields the attention layers of a component, in its order."""
    for name, layer in module.named_modules():
        processor = processor_of(layer)
        if processor is not None and callable(processor):
            yield Site(name, layer, processor, _exchangeable(processor))


def processor_of(layer: nn.Module) -> Any:
    """The processor of a layer, None where there is none."""
    # One that is a module lives among the layer's parts.
    return vars(layer).get("processor") or layer._modules.get("processor")


def _exchangeable(processor: Any) -> bool:
    if LAYER in getattr(processor, "__dict__", {}):
        return True  # it is redirected already
    return any(_exchanged(method, None) for method in _methods(type(processor)).values())


def _methods(cls: type) -> dict[str, FunctionType]:
    """The plain methods of a processor's class, with what it inherits, but not those of `nn.Module`."""
    # From the base on, so that what a class overrides counts.
    classes = [each for each in reversed(cls.__mro__) if not each.__module__.startswith("torch.")]
    found = {name: value for each in classes for name, value in vars(each).items()}
    return {name: value for name, value in found.items() if isinstance(value, FunctionType)}


def find_scopes(module: nn.Module) -> list[nn.Module]:
    """Finds what a component without processors computes attention in, to be redirected call by call.

    Args:
        module: A VAE of diffusers, whose attention blocks call PyTorch's function, or a model of transformers, which is
            redirected as a whole.

    Returns:
        The modules; none where there is no such attention.
    """
    found = [each for each in module.modules() if _SDPA in _names_in(each)]
    uses = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return found or ([module] if uses == _TRANSFORMERS_SDPA else [])


def find_others(module: nn.Module) -> list[str]:
    """Names of the modules that compute attention by PyTorch's function for it, beside layers with processors."""
    by_class: dict[type, bool] = {}
    found = []
    for name, each in module.named_modules():
        if type(each) not in by_class:
            by_class[type(each)] = _SDPA in _names_in(each)
        if by_class[type(each)] and processor_of(each) is None:
            found.append(name)
    return found


_BASE = "_sgl_diffusion_accel_base"  # name under which a class of ours knows the processor's own

_TRANSFORMERS_SDPA = "sdpa"  # its models say which attention they were made with


def _names_in(module: nn.Module) -> set[str]:
    """Names of what a module's own methods use."""
    classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.")]
    methods = [value for cls in classes for value in vars(cls).values() if isinstance(value, FunctionType)]
    return {name for method in methods for name in _names(method.__code__)}


def _names(code: CodeType) -> set[str]:
    """The names that code uses, also in the functions that are written inside of it."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return {*code.co_names, *(name for each in inner for name in _names(each))}


def redirected(site: Site, redirect: Redirect, classes: dict[type, type]) -> Any:
    """Returns a copy of a site's processor whose attention calls go to `redirect`.

    Args:
        site: The layer.
        redirect: Where they go.
        classes: The classes that have been made for this redirect, by original class; a new one is added. All layers
            with the same class of processor share one, so that compiled blocks are compiled once.
    """
    base: Any = vars(type(site.processor)).get(_BASE, type(site.processor))  # one of a removed patch may have come back
    if base not in classes:
        namespace = {
            **{
                name: _with_exchanged_names(method, redirect)
                for name, method in _methods(base).items()
                if _exchanged(method, None)
            },
            "__reduce_ex__": _as_the_original(base),
            _BASE: base,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        make: Any = type(base)
        classes[base] = make(base.__name__, (base,), namespace)
    # Shallow: one that is a module shares its weights with the original.
    made = copy.copy(site.processor)
    object.__setattr__(made, "__class__", classes[base])
    object.__setattr__(made, LAYER, site.name)
    return made


def _as_the_original(base: Any) -> Any:
    """A copy or a pickle of a redirected processor is one of the processor itself."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        del protocol
        state = {name: value for name, value in vars(self).items() if name != LAYER}
        return copyreg._reconstructor, (base, object, None), state  # type: ignore[attr-defined]

    return __reduce_ex__


def _with_exchanged_names(function: Any, redirect: Redirect, within: frozenset[Any] = frozenset()) -> Any:
    """The same code, with other meanings for the names of the attention functions."""
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    # Without a name `torch.compile` looks globals up in this very dict, and not in the module of that name.
    names.update(_exchanged(function, redirect, within))
    # Code of its own: `torch.compile` keeps what it compiled with the code object, whatever globals a function has, and
    # would run what it made for one of two functions in the other.
    code = function.__code__.replace()
    made = FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = dict(function.__annotations__)
    made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
    return made


def _exchanged(
    function: FunctionType, redirect: Redirect | None, within: frozenset[Any] = frozenset()
) -> dict[str, Any]:
    """The globals of a function that have to mean something else; without a redirect, only which they are.

    Functions that it calls by name are followed: FLUX.2 Klein's processors with a key and value cache hand their work
    to one. `within` are those that are being looked at, which may call each other.
    """
    used = _names(function.__code__)
    found: dict[str, Any] = {}
    for name in used & function.__globals__.keys():
        meaning = function.__globals__[name]
        if name == _DISPATCHER:
            found[name] = redirect and redirect.dispatch
        # `F.scaled_dot_product_attention` is looked up in `F` at the call, so that the module is exchanged as a whole.
        elif meaning is F:
            if _SDPA in used:
                found[name] = redirect and _functional(redirect)
        elif meaning is F.scaled_dot_product_attention:
            found[name] = redirect and redirect.sdpa
        elif _is_followed(meaning) and meaning not in within:
            inside = within | {function}
            if _exchanged(meaning, None, inside):
                found[name] = redirect and _with_exchanged_names(meaning, redirect, inside)
    return found


def _is_followed(meaning: Any) -> bool:
    return isinstance(meaning, FunctionType) and not (meaning.__module__ or "").startswith("torch.")


def _functional(redirect: Redirect) -> ModuleType:
    """`torch.nn.functional` with another attention."""
    made = ModuleType(F.__name__)
    made.__dict__.update(vars(F))
    vars(made)[_SDPA] = redirect.sdpa
    return made


class Scope(TorchFunctionMode):
    """While it is entered, this thread's calls of `scaled_dot_product_attention` go to a redirect."""

    def __init__(self, redirect: Redirect) -> None:
        super().__init__()
        self._redirect = redirect

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        if function is F.scaled_dot_product_attention:
            return self._redirect.sdpa(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))
