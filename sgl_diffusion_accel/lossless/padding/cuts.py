"""What is cut of one call's inputs: decided once for each mask, from what was read of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion_accel.caching.parts.output_tensors import take_apart
from sgl_diffusion_accel.lossless.padding.known_places import KnownPlaces
from sgl_diffusion_accel.lossless.padding.marks import Valid
from sgl_diffusion_accel.lossless.padding.no_mask import HidesNothing
from sgl_diffusion_accel.lossless.padding.table import Row, Stream


@dataclass(frozen=True, eq=False)
class StreamCut:
    """What stays of a stream.

    Attributes:
        stream: The stream.
        before: Its tokens, as they are given.
        kept: Which stay: a slice, or their indices on the device.
        after: How many that are.
        counts: Which of the tokens given count, `[B, L]`, on the host.
        is_full: Whether all of those that stay count, in each sample.
    """

    stream: Stream
    before: int
    kept: slice | Tensor
    after: int
    counts: Tensor
    is_full: bool

    def of(self, given: Tensor, axis: int) -> Tensor:
        """The tokens that stay."""
        if isinstance(self.kept, Tensor):
            return given.index_select(axis, self.kept)
        # `narrow` and not an index: it takes any dimension, and is as quick.
        return given.narrow(axis, self.kept.start, self.after)

    def beside(self, given: Tensor) -> Tensor:
        """Rows `[L + M, …]` of tokens and picture, without those of the tokens that go."""
        return torch.cat([self.of(given[: self.before], 0), given[self.before :]])


@dataclass(frozen=True)
class Trimmed:
    """What was cut of a call, to be told.

    Attributes:
        tokens: Streams that were given, each as (name, tokens before, tokens after).
        has_mask: Whether the model's mask is still needed.
        remark: Why the call is left alone; empty where it is not.
    """

    tokens: tuple[tuple[str, int, int], ...] = ()
    has_mask: bool = True
    remark: str = ""

    def __str__(self) -> str:
        if self.remark:
            return f"left alone: {self.remark}"
        if not self.tokens:
            return "cut to other lengths"
        cuts = ", ".join(f"{name} {before:,} → {after:,}" for name, before, after in self.tokens)
        return f"{cuts} tokens; {'with its mask' if self.has_mask else 'without a mask'}"


@dataclass(frozen=True, eq=False)
class Cut:
    """What is cut of a call.

    Attributes:
        row: Of the model.
        streams: What stays of its streams; those that a call is not given are missing.
        has_mask: Whether anything is hidden among what stays.
        remark: Why nothing is cut; empty where something may be.
        verified: The shapes of the calls that were made both ways.
    """

    row: Row
    streams: tuple[StreamCut, ...] = ()
    has_mask: bool = True
    remark: str = ""
    verified: set[Any] = field(default_factory=set)

    @cached_property
    def told(self) -> Trimmed:
        """The same, to be told."""
        tokens = tuple((each.stream.tokens[0], each.before, each.after) for each in self.streams)
        return Trimmed(tokens, self.has_mask, self.remark)

    @cached_property
    def told_with_mask(self) -> Trimmed:
        """The same where the mask could not be taken from the blocks."""
        return replace(self.told, has_mask=True)

    @property
    def drops_in_blocks(self) -> bool:
        """Whether the blocks are to be given no mask, or what stands for it."""
        if self.row.blocks is None or not self.streams:
            return False
        return self.in_blocks is not None if self.row.blocks.asks_for_places else not self.has_mask

    @cached_property
    def in_blocks(self) -> object:
        """What the blocks are given in the mask's place."""
        blocks = self.row.blocks
        if blocks is None or not blocks.own:
            return None
        if not blocks.asks_for_places:
            return HidesNothing()
        stay = self.streams[0].counts[:, self.streams[0].kept]
        # Tokens that count are the first ones, unless somebody hides some among them.
        is_prefix = bool((stay[:, 1:] <= stay[:, :-1]).all())
        return KnownPlaces(stay.sum(1).tolist()) if is_prefix else None

    @property
    def changes(self) -> bool:
        """Whether the call is any other than it was."""
        if not self.streams:
            return False
        return (
            self.drops_in_blocks
            or not self.has_mask
            or any(each.after < each.before or self._is_unmasked(each) for each in self.streams)
        )

    def _is_unmasked(self, cut: StreamCut) -> bool:
        """Whether a stream needs no mask, whatever those beside it need."""
        return self.row.takes_none and cut.is_full and not (self.row.only_alone and self.has_mask)

    def apply(self, given: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The arguments that change.

        Args:
            given: The call's tensors, by parameter.

        Returns:
            What they become, by parameter.
        """
        changed: dict[str, Tensor | None] = {}
        for each in self.streams:
            stream = each.stream
            if each.after < each.before:
                for name in stream.cut_names:
                    # A mask has its tokens at 1, whatever the tokens have.
                    changed[name] = each.of(given[name], 1 if name == stream.mark else stream.axis)
                changed |= {name: each.beside(given[name]) for name in stream.beside}
            if self._is_unmasked(each):
                changed[stream.mark] = None
        return changed

    def with_other_pads(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The arguments with what is no token multiplied by ten, to see that it changes nothing."""
        changed = {}
        for each in self.streams:
            for name in each.stream.tokens:
                tokens = given[name]
                if tokens.is_floating_point():
                    shape = [1] * tokens.ndim
                    shape[0], shape[each.stream.axis] = each.counts.shape
                    counts = each.counts.to(tokens.device).view(shape)
                    changed[name] = torch.where(counts, tokens, tokens * 10)
        return changed

    def what_counts(self, output: Tensor) -> Tensor:
        """An output without what no one reads: the places of padding, where it has any."""
        if not self.row.restores:
            return output
        return output * self.streams[0].counts.to(output.device, output.dtype)[..., None]

    def restore(self, output: Any) -> Any:
        """Gives an output the tokens back that were cut, as zeros."""
        cut = self.streams[0] if self.row.restores and self.streams else None
        if cut is None or cut.after == cut.before or not isinstance(cut.kept, slice):
            return output
        tensors, together = take_apart(output)
        ends = (0, 0, cut.kept.start, cut.before - cut.kept.stop)
        return together([F.pad(each, ends) for each in tensors])


def cut_of(row: Row, streams: list[tuple[Stream, Valid, int]], device: torch.device) -> Cut:
    """Decides what may be cut.

    Args:
        row: Of the model.
        streams: The streams that are given, which of their tokens count, and how many there are.
        device: Where the tokens are.
    """
    made = []
    for stream, valid, length in streams:
        counts = valid.tokens.sum(1)
        if not stream.may_vanish and not counts.all():
            return Cut(row, remark=f"no token of a sample counts in {stream.tokens[0]}")
        kept = _kept(stream, valid.tokens.any(0), length)
        inside = valid.tokens[:, kept]
        after = inside.shape[1]
        if isinstance(kept, Tensor):
            kept = kept.to(device)
        made.append(StreamCut(stream, length, kept, after, valid.tokens, bool(inside.all())))
    batch = max(valid.tokens.shape[0] for _, valid, _ in streams)
    is_plain = all(valid.is_plain for _, valid, _ in streams) and not (row.only_alone and batch > 1)
    has_mask = row.keeps_mask or not is_plain or not all(each.is_full for each in made)
    return Cut(row, tuple(made), has_mask)


def _kept(stream: Stream, counts: Tensor, length: int) -> slice | Tensor:
    """The tokens that count in any sample: the fewest that padding of the stream's kind allows to keep."""
    places = counts.nonzero().flatten()
    if not len(places):
        return slice(0, 0)
    first, last = int(places[0]), int(places[-1])
    start = 0 if stream.pads == "end" else first
    stop = length if stream.pads == "start" else min(max(last + 1, start + stream.least), length)
    if stream.pads != "anywhere" or stop - start == len(places):
        return slice(start, stop)
    return places
