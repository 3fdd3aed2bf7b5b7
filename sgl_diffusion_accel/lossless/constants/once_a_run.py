"""Computes a part of a transformer once a run and branch, where it depends on the prompt alone.

Ideogram 4 projects what its language model says of the prompt, 53,248 numbers for each token, in each of its calls: a
fortieth of all it computes.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.intercept import release
from sgl_diffusion_accel.loop.runs import Kept, Run
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.lossless.arguments import Arguments
from sgl_diffusion_accel.lossless.call_handler import KIND
from sgl_diffusion_accel.lossless.constants.part_state import PartState, layers_of
from sgl_diffusion_accel.lossless.padding.block_masks import BlockMasks
from sgl_diffusion_accel.lossless.padding.reading import Known
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import Instead
from sgl_diffusion_accel.targets import Target, model_class


@dataclass(frozen=True)
class Constant:
    """A part of a transformer that gives the same in every call of a run.

    Attributes:
        part: Its name in the transformer. It lies outside of the blocks.
        of: Parameters of the transformer's `forward` on which its output depends, beside weights.
        before: Other parts through which its input goes: their weights count as well.
    """

    part: str
    of: tuple[str, ...]
    before: tuple[str, ...] = ()


class _Outputs(Kept):
    """What the part gave in a run: branch to the arguments of the call, the weights, and the output."""

    def __init__(self) -> None:
        self.by_branch: dict[str, tuple[tuple[Known, ...], PartState, Tensor]] = {}

    def nbytes(self) -> int:
        """Bytes of the outputs."""
        return sum(output.nbytes for *_, output in self.by_branch.values())


class _Present(threading.local):
    """The transformer's call that is under way in this thread: its run's outputs, its branch, its arguments."""

    call: tuple[_Outputs, str, tuple[Tensor, ...]] | None = None


class OnceARun:
    """A constant of one transformer.

    Outside of a loop nothing is kept: what is kept has to go at its end. Where gradients are wanted neither: the graph
    behind an output serves one backward pass.

    Args:
        target: The transformer.
        constant: Its part.

    Attributes:
        present: The call that is under way.
        computed: How often the part was computed.
        spared: How often it was not.
    """

    def __init__(self, target: Target, constant: Constant) -> None:
        self.present = _Present()
        self.computed = self.spared = 0
        self._module = weakref.ref(target.module)
        # Inside of adapters, whose scale and number may change at any step.
        self._innermost = weakref.ref(layers_of(target.module.get_submodule(constant.part))[-1])
        self._constant = constant
        self._name = target.name
        self._whole = BlockMasks(target, None)
        self._session = Session(otherwise=None)
        model: Any = model_class(target.module)
        self._arguments = Arguments(model.forward)

    @property
    def part(self) -> nn.Module | None:
        """The part of the transformer; None where it is compiled as a whole, which must not be cut into pieces."""
        return None if self._whole.is_compiled else self._innermost()

    def state(self) -> PartState | None:
        """What its output depends on beside the arguments, as it is now."""
        found = self._found()
        return PartState(*found) if found is not None else None

    def is_still(self, state: PartState) -> bool:
        """Whether that is as it was."""
        found = self._found()
        return found is not None and state.is_still(*found)

    def _found(self) -> tuple[nn.Module, list[nn.Module]] | None:
        module = self._module()
        if module is None:
            return None
        part, *before = map(module.get_submodule, (self._constant.part, *self._constant.before))
        return part, before

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run | None:
        """Begins a call: whose constants does it have?"""
        innermost, found = self._innermost(), self._found()
        if self._whole.is_compiled and innermost is not None:
            release(innermost, KIND)
            return None
        if found is None or torch.is_grad_enabled():
            return None
        given = self._arguments.find(self._constant.of, args, kwargs)
        tensors = tuple(value for value in given.values() if isinstance(value, Tensor) and not value.is_inference())
        if len(tensors) < len(self._constant.of) or _is_moved(found[0]):
            return None
        where = self._session.enter(self._name, module, args, kwargs)
        if where is None:
            return None
        if not isinstance(where.run.kept, _Outputs):
            where.run.kept = _Outputs()
        self.present.call = (where.run.kept, where.branch, tensors)
        return where.run

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
        """How often the part was computed."""
        total = self.computed + self.spared
        return [f"{self._constant.part} computed {self.computed} times in {total} calls of a loop"]

    def line(self) -> str:
        """The same in a few words."""
        return f"{self._constant.part} spared {self.spared} times"

    def forget(self) -> None:
        """Lets go of the outputs."""
        self._session.runs.clear()


_MOVERS = ("_hf_hook", "_diffusers_hook")
"""Attributes of modules whose weights accelerate or diffusers brings to the device when they are called."""


def _is_moved(part: nn.Module) -> bool:
    """Whether weights are moved when a part is called: that may fetch the next one's too, so that it must be called."""
    return any(name in vars(each) for each in part.modules() for name in _MOVERS)


class ConstantHandler(PatchHandler):
    """Stands in front of the part, and answers for it from the second call of a run and branch on.

    Args:
        patch: The patch that it belongs to.
        once: Knows the transformer's call.
    """

    is_inmost = True

    def __init__(self, patch: Patch, once: OnceARun) -> None:
        self.patch = patch
        self._once = once

    def enter(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any]) -> Any:
        """Answers with what is kept."""
        call = self._once.present.call
        if call is None:
            return None
        outputs, branch, tensors = call
        kept = outputs.by_branch.get(branch)
        if kept is not None:
            known, state, output = kept
            if all(map(Known.is_still, known, tensors)) and self._once.is_still(state):
                self._once.spared += 1
                return Instead(output)
        return call

    def leave(self, _: nn.Module, token: Any, output: Any) -> Any:
        """Keeps what was computed."""
        if token is not None and isinstance(output, Tensor):
            outputs, branch, tensors = token
            self._once.computed += 1
            state = self._once.state()
            if state is not None:
                outputs.by_branch[branch] = (tuple(map(Known, tensors)), state, output)
        return output

    def fail(self, _: nn.Module, __: Any) -> None:
        """Nothing: the transformer's own handler ends the call."""
