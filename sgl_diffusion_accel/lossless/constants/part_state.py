"""What the output of a transformer's part depends on beside its input, to see whether it would be the same again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.lossless.padding.reading import Known


def layers_of(part: nn.Module) -> list[nn.Module]:
    """A part and what it is around, outermost first: adapters hold the layer that they add to as `base_layer`."""
    layers = [part]
    while (inner := layers[-1]._modules.get("base_layer")) is not None:
        layers.append(inner)
    return layers


_MOVERS = ("_hf_hook", "_diffusers_hook")
"""Attributes of modules whose weights accelerate or diffusers brings to the device when they are called."""


def are_moved(modules: Iterable[nn.Module]) -> bool:
    """Whether weights of one of some modules are moved when it is called."""
    return any(name in vars(each) for each in modules for name in _MOVERS)


class PartState:
    """Weights, hooks, merged adapters and autocast, as they were.

    Adapters that are not merged are computed outside of the innermost layer, and need not be known.

    Args:
        part: The part, with its adapters.
        before: Parts of the transformer through which its input has gone.
    """

    def __init__(self, part: nn.Module, before: Sequence[nn.Module]) -> None:
        layers = layers_of(part)
        weights, self._settings = _weights_and_settings(layers, before)
        self._layers = [weakref.ref(each) for each in layers]
        self._weights = [(Known(each), _address_of(each)) for each in weights]

    def is_still(self, part: nn.Module, before: Sequence[nn.Module]) -> bool:
        """Whether all is as it was."""
        layers = layers_of(part)
        weights, settings = _weights_and_settings(layers, before)
        return (
            settings == self._settings
            and len(layers) == len(self._layers)
            and len(weights) == len(self._weights)
            and all(found() is each for found, each in zip(self._layers, layers, strict=True))
            and all(
                known.is_still(each) and address == _address_of(each)
                for (known, address), each in zip(self._weights, weights, strict=True)
            )
        )


class LayerState:
    """The same of a single layer, in half a microsecond: models have hundreds.

    Autocast is known by the part that its input comes from. With hooks it is never as it was.

    Args:
        layer: The layer, inside of adapters.
        top: The same with its adapters.
    """

    __slots__ = ("_buffers", "_merged", "_parameters")

    def __init__(self, layer: nn.Module, top: nn.Module | None) -> None:
        self._parameters, self._buffers = _as_they_are(layer._parameters), _as_they_are(layer._buffers)
        self._merged = None if top is layer else _merged_in(top)

    def is_still(self, layer: nn.Module, top: nn.Module | None) -> bool:
        """Whether all is as it was."""
        if layer._forward_hooks or layer._forward_pre_hooks or not _are_still(self._parameters, layer._parameters):
            return False
        if (self._buffers or layer._buffers) and not _are_still(self._buffers, layer._buffers):
            return False
        return self._merged is None if top is layer else self._merged == _merged_in(top)


_Weight = tuple[str, weakref.ref[Tensor], int | None, int]
"""Name, weight, how often it was written to (None where that is not counted), address (0 where it has none)."""


def _as_they_are(weights: Mapping[str, Tensor | None]) -> list[_Weight]:
    return [
        (name, weakref.ref(weight), None if weight.is_inference() else weight._version, _address_of(weight))
        for name, weight in weights.items()
        if weight is not None
    ]


def _are_still(before: list[_Weight], weights: Mapping[str, Tensor | None]) -> bool:
    count = 0
    for name, known, version, address in before:
        weight = weights.get(name)
        if weight is None or known() is not weight:
            return False
        if (version is not None and version != weight._version) or (address and address != weight.data_ptr()):
            return False
        count += 1
    return count == len(weights) or count == sum(weight is not None for weight in weights.values())


def _merged_in(top: nn.Module | None) -> tuple[Any, ...] | None:
    """The adapters that are merged into a layer, by what is around it."""
    if top is None:
        return None
    return tuple(tuple(getattr(each, "merged_adapters", ())) for each in layers_of(top)[:-1])


def _weights_and_settings(
    layers: Sequence[nn.Module], before: Sequence[nn.Module]
) -> tuple[list[Tensor], tuple[Any, ...]]:
    weights: list[Tensor] = []
    # PEFT adds to `weight.data` when it merges, which no count of writes tells. The keys of hooks are numbers that no
    # other hook of the process gets.
    settings: list[Any] = [tuple(getattr(each, "merged_adapters", ())) for each in layers[:-1]]
    for top in (layers[-1], *before):
        for each in top.modules():
            settings += [*each._forward_pre_hooks, *each._forward_hooks]
            held = (*each._parameters.values(), *each._buffers.values())
            weights += [weight for weight in held if weight is not None]
    device = next((weight.device.type for weight in weights if not weight.is_meta), "cpu")
    settings.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    return weights, tuple(settings)


def _address_of(weight: Tensor) -> int:
    # What is assigned to `.data` counts as no write. Tensors of other classes, quantised ones say, may have no address.
    return weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) else 0
