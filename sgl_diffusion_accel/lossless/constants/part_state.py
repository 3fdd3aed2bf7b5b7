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
    while (inner := layers[-1]._modules.get("base_layer")) is not None:
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
