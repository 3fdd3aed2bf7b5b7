"""Of what kind is what a transformer is given at a step: a change in mid-run makes earlier outputs useless.

A ControlNet may be switched on or off in mid-run (`control_guidance_start`, `control_guidance_end`), or an input appear
that was None. What the transformer says then jumps, and nothing that it said before predicts it. Pipelines multiply the
residuals of a ControlNet that is off by 0 and pass them on, so that the arguments alone do not tell; their scale does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Kind = frozenset[str]
"""Names of the tensors that are given and of the switches that are on."""

_SCALE = "cond_scale"  # in the loop of every pipeline of diffusers with such a window, and in modular ones' state


def switches_on(local: Mapping[str, Any]) -> Kind:
    """Which control of a pipeline's loop has an effect at this step.

    Args:
        local: The loop's variables.

    Returns:
        A name for each scale that is not 0. How large it is does not matter: it may change smoothly.
    """
    scale = local.get(_SCALE, getattr(local.get("block_state"), _SCALE, None))
    scales = scale if isinstance(scale, (list, tuple)) else [scale]
    return frozenset(f"control {i}" for i, each in enumerate(scales) if isinstance(each, (int, float)) and each != 0)


def tensors_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kind:
    """Which arguments of a call are tensors or hold some, by name or position."""
    named = (*((str(i), value) for i, value in enumerate(args)), *kwargs.items())
    return frozenset(name for outer, value in named for name in _holding(outer, value))


def _holding(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if _holds(inner):
                yield f"{name}.{key}"
    elif _holds(value):
        yield name


def _holds(value: Any) -> bool:
    """Whether it is a tensor, or a list with one."""
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds, value)))


class Latents(NamedTuple):
    """The form of the latents that a transformer is given: a tensor, or a list of them, one a sample.

    Attributes:
        shape: Of the tensor, or of the first one of a list.
        dtype: Its dtype.
        device: Its device.
        number: Tensors in the list; 1 without one.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    number: int

    @property
    def samples(self) -> int:
        """Of the batch; 0 for a tensor without dimensions."""
        return self.number if self.number > 1 else self.shape[0] if self.shape else 0


def latents_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Latents | None:
    """The form of the first tensor of a call, or list of them: the latents. None where there is none."""
    for value in (*args, *kwargs.values()):
        several = value if isinstance(value, (list, tuple)) else [value]
        if several and isinstance(several[0], Tensor):
            return Latents(several[0].shape, several[0].dtype, several[0].device, len(several))
    return None
