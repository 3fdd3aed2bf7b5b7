"""What is told of a class whose parts give one result in all calls of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Constant:
    """A part of a transformer that gives the same in every call of a run.

    Attributes:
        part: Its name in the transformer. It lies outside of the blocks.
        of: Parameters of the transformer's `forward` on which its output depends, beside weights: the text first, then
            those that tell where padding is cut, which may be None.
        before: Other parts through which its input goes: their weights count as well.
        layers: Layers of each block, `"attn2.to_k"`, that are given its output as it is. What they give is constant,
            too.
    """

    part: str
    of: tuple[str, ...]
    before: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Constants:
    """The constant parts of one class.

    Attributes:
        parts: In the order in which a call comes by.
        blocks: Name of the list of blocks whose layers are given the output of a part; empty where none is.
        latents: What looks at the text, as (how the names of a block's parts begin, parameter of `forward`); of those
            that fit the first counts.
        unless: Attributes of the transformer with which nothing is constant, and why.
    """

    parts: tuple[Constant, ...]
    blocks: str = ""
    latents: tuple[tuple[str, str], ...] = (("", "hidden_states"),)
    unless: tuple[tuple[str, str], ...] = field(default=())

    @property
    def parameters(self) -> set[str]:
        """The parameters of `forward` that it names."""
        return {name for each in self.parts for name in each.of} | {name for _, name in self.latents}

    def why_not(self, module: nn.Module) -> str:
        """Why nothing of a transformer is constant; empty where it is."""
        for name, why in self.unless:
            if _attribute(module, name):
                return why
        named = [(module, part) for each in self.parts for part in (each.part, *each.before)]
        if self.blocks:
            blocks: Any = _attribute(module, self.blocks) or ()
            named += [(block, layer) for block in blocks for each in self.parts for layer in each.layers]
        missing = [name for owner, name in named if _attribute(owner, name) is None]
        return f"it has no {missing[0]}" if missing else ""


def _attribute(module: object, path: str) -> object:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
