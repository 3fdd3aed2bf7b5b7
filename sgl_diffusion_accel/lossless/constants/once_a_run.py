"""Computes parts of a transformer once a run and branch, where they depend on the prompt alone.

Ideogram 4 projects what its language model says of the prompt, 53,248 numbers for each token, in each of its calls: a
fortieth of all it computes. Others make keys and values of the prompt in each block (`text_layers.py`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.intercept import release
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.lossless.arguments import Arguments
from sgl_diffusion_accel.lossless.both_ways import Verification
from sgl_diffusion_accel.lossless.call_handler import KIND
from sgl_diffusion_accel.lossless.constants.constant import Constant, Constants
from sgl_diffusion_accel.lossless.constants.kept import Branch, Call, Given, Outputs, PartOutput, Present, known_of
from sgl_diffusion_accel.lossless.constants.part_state import PartState, are_moved, layers_of
from sgl_diffusion_accel.lossless.constants.text_layers import TextLayers
from sgl_diffusion_accel.lossless.padding.block_masks import BlockMasks
from sgl_diffusion_accel.lossless.padding.reading import Known
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import Instead
from sgl_diffusion_accel.targets import Target, model_class


class ConstantPart:
    """A constant part of one transformer.

    Args:
        module: The transformer.
        constant: What is told of the part.

    Attributes:
        constant: The same.
        computed: How often it was computed.
        spared: How often it was not.
    """

    def __init__(self, module: nn.Module, constant: Constant) -> None:
        self.constant = constant
        self.computed = self.spared = 0
        self._module = weakref.ref(module)
        # Inside of adapters, whose scale and number may change at any step.
        self._innermost = weakref.ref(layers_of(module.get_submodule(constant.part))[-1])

    @property
    def innermost(self) -> nn.Module | None:
        """The part, in whatever adapters it is."""
        return self._innermost()

    def found(self) -> tuple[nn.Module, list[nn.Module]] | None:
        """The part with its adapters, and those before it; None where the transformer is gone."""
        module = self._module()
        if module is None:
            return None
        part, *before = map(module.get_submodule, (self.constant.part, *self.constant.before))
        return part, before

    def state(self) -> PartState | None:
        """What its output depends on beside the arguments, as it is now."""
        found = self.found()
        return PartState(*found) if found is not None else None

    def is_still(self, state: PartState) -> bool:
        """Whether that is as it was."""
        found = self.found()
        return found is not None and state.is_still(*found)

    def given(self, values: dict[str, Any]) -> Given | None:
        """The arguments of a call on which it depends; None where they cannot be known again."""
        given = tuple(values.get(name) for name in self.constant.of)
        rest = [value for value in given[1:] if value is not None]
        # Tensors of `torch.inference_mode` count no writes.
        is_known = all(isinstance(value, Tensor) and not value.is_inference() for value in (given[0], *rest))
        return given if is_known else None


class OnceARun:
    """The constants of one transformer.

    Outside of a loop nothing is kept: what is kept has to go at its end. Where gradients are wanted neither: the graph
    behind an output serves one backward pass.

    Args:
        target: The transformer.
        constants: What is told of its class.
        verify: Makes the first of what is kept once more, and raises where that differs; None verifies none.

    Attributes:
        parts: Its constant parts.
        layers: Those of its blocks that are given the text; None where that is nothing to them.
        present: The call that is under way.
        verify: The same as given.
    """

    def __init__(self, target: Target, constants: Constants, verify: Verification | None) -> None:
        self.present = Present()
        self.verify = verify
        self.parts = [ConstantPart(target.module, each) for each in constants.parts]
        self.layers = TextLayers(target, constants, self.present, verify) if constants.blocks else None
        self.module = weakref.ref(target.module)
        self._names = constants.parameters
        self._name = target.name
        self._whole = BlockMasks(target, None)
        self._session = Session(otherwise=None)
        model: Any = model_class(target.module)
        self._arguments = Arguments(model.forward)

    @property
    def spared(self) -> int:
        """How often something was not computed."""
        return sum(each.spared for each in self.parts) + (self.layers.spared if self.layers is not None else 0)

    def attach(self, patch: Patch) -> None:
        """Puts something in front of the parts; not where the transformer is compiled as a whole."""
        if self._whole.is_compiled:  # it must not be cut into pieces
            return
        for each in self.parts:
            if each.innermost is not None:
                patch.intercept(each.innermost, ConstantHandler(patch, self, each))
        if self.layers is not None:
            self.layers.belong_to(patch)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run | None:
        """Begins a call: whose constants does it have?"""
        if self._whole.is_compiled:
            self._release()
            return None
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return None
        values = self._arguments.find(self._names, args, kwargs)
        if self.layers is not None and not self.layers.may_pay(values):
            return None
        given = self._given(values)
        if not given:
            return None
        where = self._session.enter(self._name, module, args, kwargs)
        if where is None:
            return None
        if not isinstance(where.run.kept, Outputs):
            where.run.kept = Outputs()
        branch = where.run.kept.by_branch.setdefault(where.branch, Branch())
        if not branch.is_left_alone:
            if self.layers is not None:
                self.layers.attach()
            self.present.call = Call(where.run.kept, branch, values, given)
        return where.run

    def _given(self, values: dict[str, Any]) -> dict[str, Given]:
        """Part to the arguments on which it depends, of those whose output can be known again."""
        found = {each.constant.part: each.given(values) for each in self.parts if not _is_moved(each)}
        return {part: given for part, given in found.items() if given is not None}

    def _release(self) -> None:
        for each in self.parts:
            if each.innermost is not None:
                release(each.innermost, KIND)
        if self.layers is not None:
            self.layers.release()

    def leave(self, _: Run | None, output: Any) -> Any:
        """Ends a call."""
        self.present.call = None
        return output

    def fail(self, token: Run | None) -> None:
        """Ends a call that raised, and with it the run's memory."""
        self.present.call = None
        if token is not None:
            self._session.runs.discard(token)

    def held_bytes(self) -> int:
        """Bytes of the outputs that are kept; 0 between runs."""
        return self._session.nbytes()

    def lines(self) -> list[str]:
        """How often each was computed."""
        told = [
            f"{each.constant.part} computed {each.computed} times in {each.computed + each.spared} calls of a loop"
            for each in self.parts
            if each.computed or self.layers is None
        ]
        return told + (self.layers.lines() if self.layers is not None else [])

    def line(self) -> str:
        """The same in a few words."""
        names = [each.constant.part for each in self.parts]
        names += ["keys and values of the text"] if self.layers is not None else []
        return f"{', '.join(names)} spared {self.spared} times"

    def forget(self) -> None:
        """Lets go of the outputs."""
        self._session.runs.clear()


def _is_moved(part: ConstantPart) -> bool:
    """Whether weights are moved when a part is called: that may fetch the next one's too, so that it must be called."""
    found = part.found()
    return found is None or are_moved(found[0].modules())


class ConstantHandler(PatchHandler):
    """Stands in front of a part, and answers for it from the second call of a run and branch on.

    Args:
        patch: The patch that it belongs to.
        once: Knows the transformer's call.
        part: The part.
    """

    is_inmost = True

    def __init__(self, patch: Patch, once: OnceARun, part: ConstantPart) -> None:
        self.patch = patch
        self._once, self._part = once, part
        self._name = part.constant.part

    def enter(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any]) -> Any:
        """Answers with what is kept."""
        call = self._once.present.call
        if call is None or self._name not in call.given:
            return None
        kept = call.branch.parts.get(self._name)
        if kept is not None and kept.is_of(call.given[self._name]) and self._part.is_still(kept.state):
            call.branch.is_reused = True
            if self._once.verify is not None and self._name not in call.branch.verified:
                return call, kept.output
            self._part.spared += 1
            return Instead(kept.output)
        if kept is not None and self._once.layers is not None and not call.branch.is_reused:
            self._once.layers.give_up(call)
            return None
        return call, None

    def leave(self, _: nn.Module, token: Any, output: Any) -> Any:
        """Keeps what was computed."""
        if token is None or not isinstance(output, Tensor):
            return output
        call, kept = token
        self._part.computed += 1
        if kept is not None:
            self._verify(call, kept, output)
            return kept
        state = self._part.state()
        if state is not None:
            given = known_of(call.given[self._name])
            call.branch.parts[self._name] = PartOutput(given, state, output, Known(output))
            if self._part.constant.layers and self._once.layers is not None:
                self._once.layers.decide(call, self._name, output)
        return output

    def _verify(self, call: Call, kept: Tensor, made: Tensor) -> None:
        module = self._once.module()
        if self._once.verify is not None and module is not None:
            self._once.verify.kept(module, self._name, kept, made)
        call.branch.verified.add(self._name)

    def fail(self, _: nn.Module, __: Any) -> None:
        """Nothing: the transformer's own handler ends the call."""
