"""What the output of a transformer's part depends on beside its input, to see whether it would be the same again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.lossless.padding.reading import Known


def layers_of(part: nn.Module) -> list[nn.Module]:
    """A part and what it is around, outermost first: adapters hold the layer that they add to as `base_layer`."""
    layers = [part]
    while isinstance(inner := getattr(layers[-1], "base_layer", None), nn.Module):
        layers.append(inner)
    return layers


class PartState:
    """Weights, hooks, merged adapters and autocast, as they were.

    Adapters that are not merged are computed outside of the innermost layer, and need not be known.

    Args:
        part: The part, with its adapters.
        before: Parts of the transformer through which its input has gone.
    """

    def __init__(self, part: nn.Module, before: Sequence[nn.Module]) -> None:
        self._layers = [weakref.ref(each) for each in layers_of(part)]
        self._weights = [(Known(each), _address_of(each)) for each in _weights(part, before)]
        self._settings = _settings(part, before)

    def is_still(self, part: nn.Module, before: Sequence[nn.Module]) -> bool:
        """Whether all is as it was."""
        layers, weights = layers_of(part), _weights(part, before)
        return (
            len(layers) == len(self._layers)
            and len(weights) == len(self._weights)
            and all(found() is each for found, each in zip(self._layers, layers, strict=True))
            and all(
                known.is_still(each) and address == _address_of(each)
                for (known, address), each in zip(self._weights, weights, strict=True)
            )
            and self._settings == _settings(part, before)
        )


def _modules(part: nn.Module, before: Sequence[nn.Module]) -> list[nn.Module]:
    return [each for top in (layers_of(part)[-1], *before) for each in top.modules()]


def _weights(part: nn.Module, before: Sequence[nn.Module]) -> list[Tensor]:
    found = (
        each for module in _modules(part, before) for each in (*module._parameters.values(), *module._buffers.values())
    )
    return [each for each in found if each is not None]


def _address_of(weight: Tensor) -> int:
    # What is assigned to `.data` counts as no write. Tensors of other classes, quantised ones say, may have no address.
    return weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) else 0


def _settings(part: nn.Module, before: Sequence[nn.Module]) -> tuple[Any, ...]:
    modules = _modules(part, before)
    # The keys are numbers that no other hook of the process gets.
    hooks = tuple((*module._forward_pre_hooks, *module._forward_hooks) for module in modules)
    # PEFT adds to `weight.data` when it merges, which no count of writes tells.
    merged = tuple(tuple(getattr(each, "merged_adapters", ())) for each in layers_of(part))
    device = next((weight.device.type for weight in _weights(part, before)), "cpu")
    is_autocast = torch.is_autocast_enabled(device)
    return hooks, merged, torch.get_autocast_dtype(device) if is_autocast else None
