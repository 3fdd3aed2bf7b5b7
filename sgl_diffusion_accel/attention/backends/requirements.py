"""What an attention backend needs, checked against what is known of a model or of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.errors import ConfigTypeError
from sgl_diffusion_accel.validate import count


@dataclass(frozen=True)
class AttentionFacts:
    """What is known of attention calls; None where it is not known yet.

    Attributes:
        device: `"cuda"`, `"cpu"`, ….
        capability: CUDA compute capability.
        dtype: Of query, key and value.
        head_size: Of the last dimension of query and key.
        is_hip: Whether the device is AMD's.
        mask: `""` for none, else `"bool"`, `"float"` or `"other"`.
        is_causal: Whether it is causal.
        is_square: Whether there are as many queries as keys.
        enable_gqa: Whether key and value have fewer heads than the query.
        dropout: Whether there is dropout.
    """

    device: str | None = None
    capability: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    head_size: int | None = None
    is_hip: bool = False
    mask: str | None = None
    is_causal: bool | None = None
    is_square: bool | None = None
    enable_gqa: bool | None = None
    dropout: bool | None = None


@dataclass(frozen=True)
class Requirements:
    """What a backend can take. What is left out is no restriction.

    Attributes:
        devices: Kinds of devices, such as `("cuda",)`.
        min_capability: Lowest CUDA compute capability.
        max_capability: Highest one.
        capabilities: The only ones, for kernels that are made for single architectures.
        is_hip: True for AMD alone, False for NVIDIA alone.
        dtypes: Types of query, key and value.
        head_sizes: Allowed head sizes.
        head_multiple: The head size is a multiple of it.
        max_head_size: The largest head size.
        masks: Whether it takes masks.
        causal: Whether it can be causal.
        causal_square: Whether it can be causal only for as many queries as keys, since it counts from the last of both.
        mask_and_causal: Whether it takes a mask in a causal call.
        gqa: Whether key and value may have fewer heads.
        dropout: Whether it has dropout.
    """

    devices: tuple[str, ...] = ()
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    is_hip: bool | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    head_sizes: tuple[int, ...] = ()
    head_multiple: int = 1
    max_head_size: int | None = None
    masks: bool = True
    causal: bool = True
    causal_square: bool = False
    mask_and_causal: bool = False
    gqa: bool = True
    dropout: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("devices", str), ("dtypes", torch.dtype), ("head_sizes", int)):
            _check_tuple(name, getattr(self, name), kind)
        for name in ("min_capability", "max_capability"):
            if getattr(self, name) is not None:
                _check_tuple(name, getattr(self, name), int)
                if len(getattr(self, name)) != len(_AS_PAIR):
                    raise ConfigTypeError(f"{name}={getattr(self, name)!r}; allowed: two numbers, such as {_AS_PAIR}.")
        for name in ("masks", "causal", "causal_square", "mask_and_causal", "gqa", "dropout"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigTypeError(f"{name}={getattr(self, name)!r}; allowed: True and False.")
        object.__setattr__(self, "head_multiple", count("head_multiple", self.head_multiple, 1))

    def refuses(self, facts: AttentionFacts) -> str | None:
        """Why a call cannot be taken, None if it can be as far as is known."""
        return self._refuses_device(facts) or self._refuses_numbers(facts) or self._refuses_form(facts)

    def _refuses_device(self, facts: AttentionFacts) -> str | None:
        if facts.device is None:
            return None
        if self.devices and facts.device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {facts.device}"
        if self.is_hip is not None and facts.device == "cuda" and facts.is_hip != self.is_hip:
            return f"it runs on {'AMD' if self.is_hip else 'NVIDIA'} GPUs alone"
        if facts.capability is not None:
            have = ".".join(map(str, facts.capability))
            if self.min_capability is not None and facts.capability < self.min_capability:
                return f"it needs compute capability {_dotted(self.min_capability)} or higher, and the GPU has {have}"
            if self.capabilities and facts.capability not in self.capabilities:
                allowed = ", ".join(map(_dotted, self.capabilities))
                return f"it is made for compute capabilities {allowed}, and the GPU has {have}"
            if self.max_capability is not None and facts.capability > self.max_capability:
                return f"it runs up to compute capability {_dotted(self.max_capability)}, and the GPU has {have}"
        return None

    def _refuses_numbers(self, facts: AttentionFacts) -> str | None:
        if facts.dtype is not None and self.dtypes and facts.dtype not in self.dtypes:
            return f"it takes {', '.join(map(_short, self.dtypes))}, not {_short(facts.dtype)}"
        size = facts.head_size
        if size is None:
            return None
        if self.head_sizes and size not in self.head_sizes:
            return f"it takes heads of size {', '.join(map(str, self.head_sizes))}, not {size}"
        if size % self.head_multiple:
            return f"it takes head sizes that are multiples of {self.head_multiple}, not {size}"
        if self.max_head_size is not None and size > self.max_head_size:
            return f"it takes heads up to size {self.max_head_size}, not {size}"
        return None

    def _refuses_form(self, facts: AttentionFacts) -> str | None:
        if facts.dropout and not self.dropout:
            return "it has no dropout"
        if facts.mask == "other":
            return "the mask is not a tensor"
        if facts.mask and not self.masks:
            return "it takes no mask"
        if facts.is_causal and not self.causal:
            return "it cannot be causal"
        if facts.is_causal and facts.mask and not self.mask_and_causal:
            return "it takes no mask in a causal call"
        if facts.is_causal and self.causal_square and facts.is_square is False:
            return "it can be causal for as many queries as keys alone"
        if facts.enable_gqa and not self.gqa:
            return "it needs as many heads of the key as of the query"
        return None


def facts_of(
    query: Tensor, key: Tensor, mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> AttentionFacts:
    """All there is to know of one call, with tensors `[B, H, S, D]`."""
    kind = "" if mask is None else "other"
    if isinstance(mask, Tensor):
        kind = "bool" if mask.dtype == torch.bool else "float"
    return AttentionFacts(
        device=query.device.type,
        capability=capability(query.device),
        dtype=query.dtype,
        head_size=query.shape[-1],
        is_hip=torch.version.hip is not None,
        mask=kind,
        is_causal=is_causal,
        is_square=query.shape[-2] == key.shape[-2],
        enable_gqa=enable_gqa and query.shape[1] != key.shape[1],
        dropout=dropout_p > 0,
    )


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, None for others."""
    return _capability(device.index) if device.type == "cuda" else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(index: int | None) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return major, minor


_AS_PAIR = (8, 0)


def _check_tuple(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, tuple) or not all(isinstance(each, kind) for each in value):
        raise ConfigTypeError(f"{name}={value!r}; allowed: a tuple of {kind.__name__}, such as (…,).")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
