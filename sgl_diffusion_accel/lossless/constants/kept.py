"""What is kept of a run's constants, by branch, and the call that is under way."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.loop.runs import Kept
from sgl_diffusion_accel.lossless.constants.part_state import LayerState, PartState
from sgl_diffusion_accel.lossless.padding.reading import Known, base_of

Given = tuple[Tensor | None, ...]
"""The arguments of a call on which a part depends."""


@dataclass(frozen=True)
class PartOutput:
    """What a part gave.

    Attributes:
        given: The arguments of that call.
        state: Weights and the like.
        output: It.
        written: The same as it was, to see whether somebody writes to it.
    """

    given: tuple[Known | None, ...]
    state: PartState
    output: Tensor
    written: Known

    def is_of(self, given: Given) -> bool:
        """Whether it was made of these arguments, and is as it was."""
        return self.written.is_still(self.output) and all(
            (known is None and value is None) if known is None or value is None else known.is_still(value)
            for known, value in zip(self.given, given, strict=True)
        )


def known_of(given: Given) -> tuple[Known | None, ...]:
    """Arguments as they are now."""
    return tuple(None if value is None else Known(value) for value in given)


class LayerOutput:
    """What a layer made of the text, and what that depends on.

    Args:
        layer: The layer.
        top: It in its adapters.
        output: What it gave.
    """

    __slots__ = ("_state", "_version", "output")

    def __init__(self, layer: nn.Module, top: nn.Module | None, output: Tensor) -> None:
        self._state = LayerState(layer, top)
        self._version = output._version
        self.output = output

    def is_still(self, layer: nn.Module, top: nn.Module | None) -> bool:
        """Whether the layer would give it again."""
        return self.output._version == self._version and self._state.is_still(layer, top)


@dataclass
class Branch:
    """What is kept of one branch of a run.

    Attributes:
        parts: Part to what it gave.
        texts: Part to its output as the blocks are given it.
        layers: Handler of a layer to what that made of the text.
        tokens: Part to the tokens of its output.
        planned: Part to the bytes of what layers make of it.
        is_reused: Whether anything was of use in a later call.
        is_left_alone: Whether nothing is kept.
        verified: What was made both ways.
    """

    parts: dict[str, PartOutput] = field(default_factory=dict)
    texts: dict[str, Known] = field(default_factory=dict)
    layers: dict[Any, LayerOutput] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)
    is_reused: bool = False
    is_left_alone: bool = False
    verified: set[object] = field(default_factory=set)

    def leave_alone(self) -> None:
        """Keeps nothing, from now on."""
        self.is_left_alone = True
        for each in (self.parts, self.texts, self.layers, self.planned):
            each.clear()

    def forget_layers(self, part: str) -> None:
        """Lets go of what layers made of a part's output."""
        self.texts.pop(part, None)
        self.layers = {layer: output for layer, output in self.layers.items() if layer.part != part}

    def planned_bytes(self) -> int:
        """Bytes of all outputs, once all layers have been called."""
        return sum(self.planned.values()) + sum(each.output.nbytes for each in self.parts.values())

    def nbytes(self) -> int:
        """Bytes of all outputs."""
        parts = sum(each.output.nbytes for each in self.parts.values())
        return parts + sum(each.output.nbytes for each in self.layers.values())


class Outputs(Kept):
    """What a run keeps, by branch."""

    def __init__(self) -> None:
        self.by_branch: dict[str, Branch] = {}

    def nbytes(self) -> int:
        """Bytes of the outputs."""
        return sum(each.nbytes() for each in self.by_branch.values())


class Call:
    """A call of the transformer.

    Args:
        outputs: What its run keeps.
        branch: What is kept of its branch.
        values: Its arguments, by parameter.
        given: Part to the arguments on which it depends.

    Attributes:
        texts: Part to what its layers are given, of which `is_constant` was found already.
    """

    __slots__ = ("branch", "given", "outputs", "texts", "values")

    def __init__(self, outputs: Outputs, branch: Branch, values: dict[str, Any], given: dict[str, Given]) -> None:
        self.outputs, self.branch, self.values, self.given = outputs, branch, values, given
        self.texts: dict[str, Tensor] = {}

    def is_constant(self, part: str, text: Any) -> bool:
        """Whether what a layer is given is the output of a part, which what is kept of layers was made of."""
        made = self.branch.parts.get(part)
        if not isinstance(text, Tensor) or made is None:
            return False
        # A linear layer's output may be a view itself.
        if base_of(made.output) is not base_of(text) or not made.written.is_still(made.output):
            return False
        known = self.branch.texts.get(part)
        if known is None or not known.is_still(text):
            self.branch.forget_layers(part)
            self.branch.texts[part] = Known(text)
        self.texts[part] = text
        return True


class Present(threading.local):
    """The transformer's call that is under way in this thread."""

    call: Call | None = None
