"""Whether keeping what layers make of the text is worth it: its share of a call's work, and the memory it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.lossless.constants.constant import Constant, Constants

LEAST_SHARE = 0.005
"""Of a call's work: below, nothing is kept. What the host spares by layers that it does not call comes on top."""

MOST_BYTES = 0.1
"""Of the transformer's weights: what one run may keep."""


class Worth:
    """Estimates for one transformer, from its weights and the numbers of tokens alone.

    A layer computes as many products as its weights have elements, for each token. Attention itself is not counted,
    so that the share is estimated too high where there are many tokens of a picture.

    Args:
        module: The transformer.
        constants: What is told of its class.
    """

    def __init__(self, module: nn.Module, constants: Constants) -> None:
        blocks: Any = module.get_submodule(constants.blocks)
        self._parts = {each.part: _elements(module.get_submodule(each.part)) for each in constants.parts}
        self._widths: dict[str, int] = {}
        self._picture = {parameter: 0 for _, parameter in constants.latents}
        for name, part in blocks[0].named_children():
            parameter = next(parameter for prefix, parameter in constants.latents if name.startswith(prefix))
            self._picture[parameter] += _elements(part) * len(blocks)
            for constant, layer in _layers_in(name, part, constants):
                elements = _elements(layer) * len(blocks)
                self._picture[parameter] -= elements
                self._parts[constant.part] += elements
                width = getattr(layer, "out_features", 0) * len(blocks)
                self._widths[constant.part] = self._widths.get(constant.part, 0) + width
        self._patch = _patch_of(getattr(module, "config", None))
        self.most_bytes = int(MOST_BYTES * sum(weight.nbytes for weight in module.parameters()))

    def share(self, texts: Mapping[str, int], latents: Mapping[str, Any]) -> float:
        """The share of a call's work that is spared where all is known.

        Args:
            texts: Tokens of the text that each part is given.
            latents: What looks at the text, by parameter: `[B, N, C]`, `[B, C, H, W]` or `[B, C, F, H, W]`.
        """
        spared = sum(elements * texts.get(part, 0) for part, elements in self._parts.items())
        others = sum(
            elements * self._tokens(latents[parameter])
            for parameter, elements in self._picture.items()
            if isinstance(latents.get(parameter), Tensor)
        )
        return spared / max(spared + others, 1)

    def nbytes(self, part: str, output: Tensor) -> int:
        """Bytes of what the layers make of a part's output, `[B, L, C]`."""
        return self._widths.get(part, 0) * (output.numel() // output.shape[-1]) * output.itemsize

    def _tokens(self, latents: Tensor) -> int:
        if latents.ndim <= 3:
            return latents.shape[1]
        return math.prod(latents.shape[2:]) // self._patch


def _layers_in(name: str, part: nn.Module, constants: Constants) -> Iterator[tuple[Constant, nn.Module]]:
    """The layers of a block's part that are given the text, with the constant that they are given."""
    for constant in constants.parts:
        for path in constant.layers:
            first, _, rest = path.partition(".")
            if first == name:
                yield constant, part.get_submodule(rest)


def _elements(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _patch_of(config: Any) -> int:
    """Latents that make one token of a picture."""
    size = getattr(config, "patch_size", 1)
    if isinstance(size, (tuple, list)):
        return math.prod(size)
    return int(size) ** 2 * int(getattr(config, "patch_size_t", None) or 1)
