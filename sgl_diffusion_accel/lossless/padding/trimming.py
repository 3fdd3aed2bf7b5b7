"""Cuts the padding of a transformer's inputs off, and takes the mask away from its blocks where it hides nothing."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from torch import nn

from sgl_diffusion_accel.lossless.arguments import Arguments
from sgl_diffusion_accel.lossless.both_ways import Verification
from sgl_diffusion_accel.lossless.call_handler import Call, is_context_parallel
from sgl_diffusion_accel.lossless.padding.block_masks import BlockMasks
from sgl_diffusion_accel.lossless.padding.cuts import Cut, Trimmed
from sgl_diffusion_accel.lossless.padding.reading import Reader
from sgl_diffusion_accel.lossless.padding.table import InBlocks, Row
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import With
from sgl_diffusion_accel.targets import Target, model_class

_MOST_KINDS = 100
"""Kinds of calls that are counted apart: a service sees prompts of all lengths for weeks."""

_MOST_SHOWN = 8
_OTHERS = Trimmed()


class Dropping(threading.local):
    """What the blocks of the call that is under way in this thread are to be given in the place of their mask.

    Attributes:
        is_on: Whether they are to be given another one.
        instead: It; None for none.
    """

    is_on: bool = False
    instead: object = None


class Padding:
    """The padding of one transformer.

    Args:
        target: The transformer.
        row: What may be cut of its inputs.
        verify: Makes the first call of each kind both ways, and raises where they differ; None verifies none.

    Attributes:
        blocks: Its blocks that are handed a mask; None where it makes none for them.
        dropping: Whether the blocks of the present call are to be given no mask.
        masks: Those of its blocks.
        reader: Knows what is to be cut.
        seen: What was cut of calls, with how many they were.
        verify: The same as given.
    """

    def __init__(self, target: Target, row: Row, verify: Verification | None) -> None:
        self.blocks = row.blocks
        self.dropping = Dropping()
        self.masks = BlockMasks(target, row.blocks)
        self.reader = Reader(row)
        self.seen: Counter[Trimmed] = Counter()
        self.verify = verify
        self._row = row
        model: Any = model_class(target.module)
        self._arguments = Arguments(model.forward)
        self._names = (*sorted(row.parameters), *row.unless)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> With | None:
        """Begins a call, on fewer tokens."""
        given = self._arguments.find(self._names, args, kwargs)
        cut = self._cut_for(module, given)
        drops = cut.drops_in_blocks and self.masks.can_drop()
        self.count(cut.told if drops or not cut.drops_in_blocks else cut.told_with_mask)
        if not cut.changes:
            return None
        trimmed = self._arguments.change(cut.apply(given), args, kwargs)
        self.dropping.is_on, self.dropping.instead = drops, cut.in_blocks if drops else None
        if self.verify is not None:
            self._verify(self.verify, module, cut, (args, kwargs), trimmed, given)
        return With(*trimmed, cut)

    def count(self, told: Trimmed) -> None:
        """Counts a call."""
        self.seen[told if told in self.seen or len(self.seen) < _MOST_KINDS else _OTHERS] += 1

    def _verify(
        self, verify: Verification, module: nn.Module, cut: Cut, call: Call, trimmed: Call, given: dict[str, Any]
    ) -> None:
        try:
            verify.cut(module, cut, call, trimmed, self._arguments.change(cut.with_other_pads(given), *call))
        except BaseException:
            self.dropping.is_on = False
            raise

    def _cut_for(self, module: nn.Module, given: dict[str, Any]) -> Cut:
        if is_context_parallel(module):
            # The text is divided among the devices as well, which the number of its tokens has to allow.
            return Cut(self._row, remark="its tokens are divided over several devices (context parallelism)")
        hindrance = next((name for name in self._row.unless if given.get(name) is not None), None)
        if hindrance is not None:
            return Cut(self._row, remark=f"it is given {hindrance}")
        return self.reader.cut_for(given)

    def leave(self, token: Cut | None, output: Any) -> Any:
        """Ends a call, and gives its output the shape that the caller expects."""
        self.dropping.is_on = False
        return output if token is None else token.restore(output)

    def fail(self, _: Cut | None) -> None:
        """Ends a call that raised."""
        self.dropping.is_on = False

    def lines(self) -> list[str]:
        """What was cut."""
        most = self.seen.most_common(_MOST_SHOWN)
        lines = [f"{count} calls: {told}" for told, count in most] or ["no call yet"]
        others = self.seen.total() - sum(count for _, count in most)
        lines += [f"{others} calls cut to other lengths: see patch.stats"] if others else []
        hindrance = self.masks.hindrance
        lines += [f"its blocks keep their masks: {hindrance}"] if hindrance else []
        return [*lines, f"masks were read from the device {self.reader.reads} times"]

    def line(self) -> str:
        """What was cut most often."""
        common = self.seen.most_common(1)
        return str(common[0][0]) if common else "no call yet"

    def forget(self) -> None:
        """Forgets the masks that were read."""
        self.reader.forget()


class MaskHandler(PatchHandler):
    """Takes the mask of one block away, in calls in which it hides nothing, or puts another thing in its place.

    Args:
        patch: The patch that it belongs to.
        dropping: Whether it is to be taken away in the transformer's present call.
        blocks: Where the mask is among the block's arguments.
    """

    is_inmost = True
    only_enters = True

    def __init__(self, patch: Patch, dropping: Dropping, blocks: InBlocks) -> None:
        self.patch = patch
        self._dropping = dropping
        self._position, self._name = blocks.position, blocks.name

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> With | None:
        """Begins a block."""
        if not self._dropping.is_on:
            return None
        if self._name in kwargs:
            return With(args, {**kwargs, self._name: self._dropping.instead})
        if self._position < len(args):
            return With((*args[: self._position], self._dropping.instead, *args[self._position + 1 :]), kwargs)
        return None

    def leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Never called: the output is the block's."""
        return output

    def fail(self, _: nn.Module, __: Any) -> None:
        """Never called: the transformer's own handler ends the call."""
