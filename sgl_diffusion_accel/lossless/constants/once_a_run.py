"""Computes a part of a transformer once a run and branch, where it depends on the prompt alone.

Ideogram 4 projects what its language model says of the prompt, 53,248 numbers for each token, in each of its calls: a
fortieth of all it computes.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.intercept import release
from sgl_diffusion_accel.loop.runs import Kept, Run
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.lossless.arguments import Arguments
from sgl_diffusion_accel.lossless.call_handler import KIND
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
    """

    part: str
    of: tuple[str, ...]


class _Outputs(Kept):
    """What the part gave in a run: branch to the arguments of the call, and the output."""

    def __init__(self) -> None:
        self.by_branch: dict[str, tuple[tuple[Known, ...], Tensor]] = {}

    def nbytes(self) -> int:
        """Bytes of the outputs."""
        return sum(output.nbytes for _, output in self.by_branch.values())


class _Present(threading.local):
    """The transformer's call that is under way in this thread: its run's outputs, its branch, its arguments."""

    call: tuple[_Outputs, str, tuple[Tensor, ...]] | None = None


class OnceARun:
    """A constant of one transformer.

    Outside of a loop nothing is kept: what is kept has to go at its end, and weights may change between runs.

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
        self._part = weakref.ref(target.module.get_submodule(constant.part))
        self._constant = constant
        self._name = target.name
        self._whole = BlockMasks(target, None)
        self._session = Session(otherwise=None)
        model: Any = model_class(target.module)
        self._arguments = Arguments(model.forward)

    @property
    def part(self) -> nn.Module | None:
        """The part of the transformer; None where it is compiled as a whole, which must not be cut into pieces."""
        return None if self._whole.is_compiled else self._part()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run | None:
        """Begins a call: whose constants does it have?"""
        part = self._part()
        if self._whole.is_compiled and part is not None:
            release(part, KIND)
            return None
        given = self._arguments.find(self._constant.of, args, kwargs)
        tensors = tuple(value for value in given.values() if isinstance(value, Tensor) and not value.is_inference())
        if len(tensors) < len(self._constant.of) or part is None or _is_moved(part):
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
        known, output = outputs.by_branch.get(branch, ((), None))
        if output is not None and all(map(Known.is_still, known, tensors)):
            self._once.spared += 1
            return Instead(output)
        return call

    def leave(self, _: nn.Module, token: Any, output: Any) -> Any:
        """Keeps what was computed."""
        if token is not None and isinstance(output, Tensor):
            outputs, branch, tensors = token
            outputs.by_branch[branch] = (tuple(map(Known, tensors)), output)
            self._once.computed += 1
        return output

    def fail(self, _: nn.Module, __: Any) -> None:
        """Nothing: the transformer's own handler ends the call."""
