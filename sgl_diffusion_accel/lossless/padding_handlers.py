"""Stands in front of a transformer and cuts its padding off, and in front of its blocks and takes their mask away."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from sgl_diffusion_accel.lossless.arguments import Arguments
from sgl_diffusion_accel.lossless.cuts import Cut, Trimmed
from sgl_diffusion_accel.lossless.no_mask import HidesNothing
from sgl_diffusion_accel.lossless.reading import Reader
from sgl_diffusion_accel.lossless.table import InBlocks, Row
from sgl_diffusion_accel.lossless.verify import Call, Verification
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import With
from sgl_diffusion_accel.targets import Target, model_class, unwrap

_MOST_KINDS = 100
_OTHERS = Trimmed()


class UnderWay(threading.local):
    """The transformer call that is under way in this thread.

    Attributes:
        is_inside: Whether there is one.
        drops: Whether its blocks are to be given no mask.
    """

    is_inside: bool = False
    drops: bool = False


class PaddingHandler(PatchHandler):
    """Cuts the padding of one transformer's inputs.

    It is innermost: caches find the place of a call in its loop by the tensors that the pipeline passes, and have to
    see those. What a cache answers itself, this one never hears of; what it computes, it computes without padding.

    Args:
        patch: The patch that it belongs to.
        target: The transformer.
        row: What may be cut of its inputs.
        can_drop: Is asked before each call whose blocks need no mask whether it can be taken from them.
        verifies: Whether first calls are made both ways.

    Attributes:
        call: The call that is under way.
        reader: Knows what is to be cut.
        seen: What was cut of calls, with how many they were.
        verify: Makes the first call of each kind both ways, and raises where they differ; None verifies none.
    """

    is_inmost = True

    def __init__(self, patch: Patch, target: Target, row: Row, can_drop: Callable[[], bool], verifies: bool) -> None:
        self.patch = patch
        self.call = UnderWay()
        self.reader = Reader(row)
        self.seen: Counter[Trimmed] = Counter()
        self.verify = Verification(target.name) if verifies else None
        self._row = row
        self._has_wrapper = target.is_wrapped
        model: Any = model_class(target.module)
        self._arguments = Arguments(model.forward)
        self._names = (*sorted(row.parameters), *row.unless)
        self._can_drop = can_drop

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> With | None:
        """Begins a call, on fewer tokens."""
        # Asked of the model alone: a call cut off by Ctrl-C may leave `is_inside` set, and the wrapper begins the next.
        if self._has_wrapper and self.call.is_inside and unwrap(module) is module:
            return None  # the wrapper has entered this call already
        given = self._arguments.find(self._names, args, kwargs)
        cut = self._cut_for(module, given)
        drops = cut.drops_in_blocks and self._can_drop()
        self._count(cut.told if drops or not cut.drops_in_blocks else cut.told_with_mask)
        if not cut.changes:
            return None
        trimmed = self._arguments.change(cut.apply(given), args, kwargs)
        self.call.is_inside, self.call.drops = True, drops
        if self.verify is not None:
            self._verify(self.verify, module, cut, (args, kwargs), trimmed, given)
        return With(*trimmed, cut)

    def _count(self, told: Trimmed) -> None:
        # A service sees prompts of all lengths for weeks.
        self.seen[told if told in self.seen or len(self.seen) < _MOST_KINDS else _OTHERS] += 1

    def _verify(
        self, verify: Verification, module: nn.Module, cut: Cut, call: Call, trimmed: Call, given: dict[str, Any]
    ) -> None:
        try:
            verify(module, cut, call, trimmed, self._arguments.change(cut.with_other_pads(given), *call))
        except BaseException:
            self._end()
            raise

    def _cut_for(self, module: nn.Module, given: dict[str, Any]) -> Cut:
        config: Any = getattr(unwrap(module), "_parallel_config", None)
        if getattr(config, "context_parallel_config", None) is not None:
            # The text is divided among the devices as well, which the number of its tokens has to allow.
            return Cut(self._row, remark="its tokens are divided over several devices (context parallelism)")
        hindrance = next((name for name in self._row.unless if given.get(name) is not None), None)
        if hindrance is not None:
            return Cut(self._row, remark=f"it is given {hindrance}")
        return self.reader.cut_for(given)

    def leave(self, _: nn.Module, token: Cut | None, output: Any) -> Any:
        """Ends a call, and gives its output the shape that the caller expects."""
        if token is None:
            return output
        self._end()
        return token.restore(output)

    def fail(self, _: nn.Module, token: Cut | None) -> None:
        """Ends a call that raised."""
        if token is not None:
            self._end()

    def _end(self) -> None:
        self.call.is_inside = self.call.drops = False


class MaskHandler(PatchHandler):
    """Takes the mask of one block away, in calls in which it hides nothing.

    Args:
        patch: The patch that it belongs to.
        call: The transformer's call that is under way.
        blocks: Where the mask is among the block's arguments.
    """

    is_inmost = True

    def __init__(self, patch: Patch, call: UnderWay, blocks: InBlocks) -> None:
        self.patch = patch
        self._call = call
        self._position, self._name = blocks.position, blocks.name
        self._none = HidesNothing() if blocks.own else None

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> With | None:
        """Begins a block."""
        if not self._call.drops:
            return None
        if self._name in kwargs:
            return With(args, {**kwargs, self._name: self._none})
        if self._position < len(args):
            return With((*args[: self._position], self._none, *args[self._position + 1 :]), kwargs)
        return None

    def leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Nothing: the output is the block's."""
        return output

    def fail(self, _: nn.Module, __: Any) -> None:
        """Nothing: the transformer's own handler ends the call."""
