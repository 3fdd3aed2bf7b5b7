"""The patch that `apply_lossless` leaves on a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from sgl_diffusion_accel.lossless.block_masks import KIND, BlockMasks
from sgl_diffusion_accel.lossless.cuts import Trimmed
from sgl_diffusion_accel.lossless.lossless_config import LosslessConfig
from sgl_diffusion_accel.lossless.padding_handlers import MaskHandler, PaddingHandler
from sgl_diffusion_accel.lossless.table import Row
from sgl_diffusion_accel.patch import Patch
from sgl_diffusion_accel.targets import Target

_MOST_SHOWN = 8
"""Kinds of calls that `print(patch)` lists."""


@dataclass(frozen=True)
class LosslessStats:
    """What was not computed.

    Attributes:
        calls: Component to what was cut of its calls, with how many they were.
        reads: Component to how often its masks were read from the device.
        verified: Component to the largest relative difference of the calls that were made both ways.
    """

    calls: Mapping[str, Mapping[Trimmed, int]]
    reads: Mapping[str, int]
    verified: Mapping[str, float]


class LosslessPatch(Patch):
    """Padding and idle masks cut from the calls of a pipeline's transformers.

    Attributes:
        config: The settings that it was applied with.
        left_alone: Component to why nothing is cut of it.
    """

    def __init__(self, config: LosslessConfig) -> None:
        super().__init__(KIND)
        self.config = config
        self.left_alone: dict[str, str] = {}
        self._handlers: dict[str, PaddingHandler] = {}
        self._models: dict[str, str] = {}
        self._masks: dict[str, BlockMasks] = {}

    @property
    def stats(self) -> LosslessStats:
        """What was not computed, up to now."""
        handlers = self._handlers.items()
        return LosslessStats(
            {name: dict(each.seen) for name, each in handlers},
            {name: each.reader.reads for name, each in handlers},
            {name: each.verify.worst for name, each in handlers if each.verify is not None},
        )

    def attach(self, target: Target, row: Row) -> None:
        """Puts the patch in front of a transformer, and of those blocks that are handed a mask."""
        masks = BlockMasks(target, row.blocks)
        handler = PaddingHandler(self, target, row, masks.can_drop, verifies=self.config.verify is not None)
        self._handlers[target.name], self._models[target.name] = handler, target.model
        self._masks[target.name] = masks
        self.stand_before(target, handler)
        if row.blocks is not None and not masks.is_compiled:
            for block in masks.blocks:
                self.intercept(block, MaskHandler(self, handler.call, row.blocks))

    def leave_alone(self, target: Target, why: str) -> None:
        """Notes that nothing is cut of a transformer."""
        self.left_alone[target.name], self._models[target.name] = why, target.model

    def _on_taken_off(self) -> None:
        for handler in self._handlers.values():
            handler.reader.forget()

    def _what(self) -> str:
        acts = [f"{name}: {_most_often(handler)}" for name, handler in self._handlers.items()]
        acts += [f"{name}: left alone" for name in self.left_alone]
        return f"lossless on {'; '.join(acts)}"

    def __str__(self) -> str:
        lines = [f"lossless{f' [{self.notice}]' if self.notice else ''}"]
        for name, handler in self._handlers.items():
            lines.append(f"  {name} ({self._models[name]})")
            most = handler.seen.most_common(_MOST_SHOWN)
            lines += [f"    {count} calls: {told}" for told, count in most] or ["    no call yet"]
            others = handler.seen.total() - sum(count for _, count in most)
            lines += [f"    {others} calls cut to other lengths: see patch.stats"] if others else []
            hindrance = self._masks[name].hindrance
            lines += [f"    its blocks keep their masks: {hindrance}"] if hindrance else []
            lines.append(f"    masks were read from the device {handler.reader.reads} times")
            if handler.verify is not None:
                lines.append(f"    made both ways: {handler.verify}")
        lines += [f"  {name} ({self._models[name]}) is left alone: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _most_often(handler: PaddingHandler) -> str:
    common = handler.seen.most_common(1)
    return str(common[0][0]) if common else "no call yet"
