"""The modulated input of a block: what its attention takes, without running the attention.

The block's own `forward` runs on a view of the block, a second object that shares all of its parts but the attention,
and stops where the attention is called. So the norms and modulations are the model's own, whatever the model; nothing
on the block itself is touched, and a compiled block stays compiled. Hooks on those parts run once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.entry import Entry
from sgl_diffusion_accel.caching.blocks.odd_models import HIDDEN_NAMES
from sgl_diffusion_accel.caching.blocks.wiring import Call
from sgl_diffusion_accel.errors import UnsupportedModelError

_OTHER_PARTS = ("norm", "adaln", "gate", "mod", "table", "proj")
"""Parts of names that have attention in them and are no attention: `attention_norm1`, `cross_attn_gate`."""


class _ReachedError(Exception):
    """Ends the block where its attention is called."""

    def __init__(self, taken: Tensor | None) -> None:
        super().__init__()
        self.taken = taken


class _Stop:
    """Stands where the attention is."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = [kwargs[name] for name in HIDDEN_NAMES if name in kwargs]
        tensors = [value for value in (*args, *named, *kwargs.values()) if isinstance(value, Tensor)]
        raise _ReachedError(tensors[0] if tensors else None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class _OnDevice:
    """Runs a part of an offloaded block on the device of its inputs."""

    def __init__(self, part: nn.Module, device: torch.device) -> None:
        self._part, self._device = part, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = {**dict(self._part.named_parameters()), **dict(self._part.named_buffers())}
        there = {name: tensor.to(self._device) for name, tensor in tensors.items() if tensor.device.type != "meta"}
        return torch.func.functional_call(self._part, there, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def has_attention(block: nn.Module) -> bool:
    """Whether a block has an attention whose input can be seen."""
    return any(_is_attention(name) or has_attention(part) for name, part in block.named_children())


def modulated_input(block: nn.Module, call: Call) -> Tensor:
    """Returns what the first attention of a block takes.

    Args:
        block: The block.
        call: The positional and keyword arguments that the block is called with.

    Returns:
        A tensor of its own, usually `[B, T, C]`.

    Raises:
        UnsupportedModelError: The block does not call an attention that is one of its parts, or writes over its input
            before it does.
    """
    entry = Entry(call, copy=False)  # watches whether the block writes over its input before its attention
    args, kwargs = entry.call
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    try:
        with torch.no_grad(), _loaded(block):
            view = _view(block, given[0].device if given else torch.device("cpu"))
            type(block).forward(view, *args, **kwargs)  # not view(...): handlers and hooks see the block once a step
    except _ReachedError as reached:
        taken = reached.taken
        reached.__traceback__ = None  # its frames hold the block's tensors
    else:
        taken = None
    if entry.changed():
        raise UnsupportedModelError(
            f"{type(block).__name__} writes over its input before its attention, so that its modulated input cannot be "
            "taken without changing the result. Use apply_cache_dit for this model."
        )
    if taken is None:
        raise UnsupportedModelError(
            f"{type(block).__name__} calls no attention that is one of its parts, whose input would be the signal. "
            "Use apply_cache_dit for this model."
        )
    # A model without a modulation hands its input on as it is: what is kept must not change with the caller's tensor.
    storages = {value.untyped_storage().data_ptr() for value in given}
    taken = taken.detach()
    return taken.clone() if taken.untyped_storage().data_ptr() in storages else taken


def _is_attention(name: str) -> bool:
    low = name.lower()
    return ("attn" in low or "attention" in low) and not any(other in low for other in _OTHER_PARTS)


def _view(block: nn.Module, device: torch.device) -> nn.Module:
    """A second object for the block, whose attentions stop the run; all else is shared."""
    # Not copy.copy, which would run __init__ or __setstate__ of whatever the block is, and would share the dict of its
    # parts: the stops would then be on the block itself, where another thread may be running.
    view: nn.Module = object.__new__(type(block))
    view.__dict__.update(vars(block))
    parts: dict[str, Any] = dict(block._modules)
    for name, part in parts.items():
        if part is None:
            continue
        if _is_attention(name):
            parts[name] = _Stop(part)
        elif has_attention(part):
            parts[name] = _view(part, device)
        elif _is_elsewhere(part, device):
            parts[name] = _OnDevice(part, device)
    view.__dict__["_modules"] = parts
    if _is_elsewhere(block, device, recurse=False):
        own: Mapping[str, Tensor | None] = block._parameters
        view.__dict__["_parameters"] = {name: None if p is None else p.to(device) for name, p in own.items()}
    # What others have put on the instance would run the block as a whole: accelerate's forward, compiled code.
    for replaced in ("forward", "_hf_hook", "_compiled_call_impl"):
        view.__dict__.pop(replaced, None)
    return view


def _is_elsewhere(part: nn.Module, device: torch.device, recurse: bool = True) -> bool:
    """Whether a part was moved to the host as a whole; what loads itself when it is called is not meant."""
    loads_itself = recurse and any("_diffusers_hook" in vars(each) for each in part.modules())
    return not loads_itself and any(p.device != device and p.device.type == "cpu" for p in part.parameters(recurse))


@contextlib.contextmanager
def _loaded(block: nn.Module) -> Iterator[None]:
    """With a block's parameters, which are elsewhere while it does not run.

    With accelerate's sequential offload they are there only between its hook's two parts, and of a block that was given
    to `fully_shard` each device holds a share.
    """
    hook: Any = getattr(block, "_hf_hook", None)
    sharded: Any = block if _is_sharded(block) else None
    if hook is not None:
        hook.pre_forward(block)
    if sharded is not None:
        sharded.unshard()
    try:
        yield
    finally:
        if sharded is not None:
            sharded.reshard()
        if hook is not None:
            hook.post_forward(block, ())


def _is_sharded(block: nn.Module) -> bool:
    """Whether `fully_shard` has divided a block among the devices, and it is not put together at present."""
    if not callable(getattr(block, "unshard", None)):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in block.parameters())
