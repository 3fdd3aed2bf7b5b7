"""Reads masks from the device: each once, and all that belong to a call together, with one sync.

What was read is remembered by the tensor itself, and by how often it was written to (`_version`), never by its
address: memory is given out again. The tensor is known by a weak reference, which no other tensor can be taken for, so
that nothing of a run is held when it is over.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.lossless.padding.cuts import Cut, cut_of
from sgl_diffusion_accel.lossless.padding.marks import Valid
from sgl_diffusion_accel.lossless.padding.table import Row, Stream

_MOST = 16
"""Cuts that are remembered: branches, twice the experts, and some."""


class Known:
    """A tensor as it was: the same elements of the same memory, not written to since.

    Args:
        tensor: The tensor. Of a view (pipelines take slices anew at each step) its base is what counts.
    """

    __slots__ = ("_base", "_layout", "_version")

    def __init__(self, tensor: Tensor) -> None:
        base = base_of(tensor)
        self._base = weakref.ref(base)
        self._version = writes_to(base)
        self._layout = _layout_of(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether a tensor is that one, unchanged."""
        base = base_of(tensor)
        return self._base() is base and self._version == writes_to(base) and self._layout == _layout_of(tensor)


def base_of(tensor: Tensor) -> Tensor:
    """What a tensor is a view of; itself, if of none."""
    return tensor if tensor._base is None else tensor._base


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for those of `torch.inference_mode`, which count no writes."""
    return 0 if tensor.is_inference() else tensor._version


def _layout_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


class Reader:
    """Knows what is to be cut of a model's calls.

    Args:
        row: Of the model.

    Attributes:
        reads: How often the device was asked.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self._known: list[tuple[tuple[Known, ...], dict[str, int], Cut]] = []
        self.reads = 0

    def cut_for(self, given: dict[str, Any]) -> Cut:
        """What is to be cut of a call.

        Args:
            given: Those of its arguments that the row names, by parameter.
        """
        streams = [each for each in self._row.streams if isinstance(given.get(each.mark), Tensor)]
        remark = self._why_not(streams, given)
        if remark:
            return Cut(self._row, remark=remark)
        marks = [given[each.mark] for each in streams]
        # By name as well: one mask may serve two streams, of which a call gives either.
        sizes = {each.mark: given[each.tokens[0]].shape[each.axis] for each in streams}
        for known, of_sizes, cut in self._known:
            if sizes == of_sizes and all(map(Known.is_still, known, marks)):
                return cut
        cut = self._read(streams, marks, list(sizes.values()), given[streams[0].tokens[0]].device)
        # Tensors of `torch.inference_mode` count no writes: what was read of them may be old at the next call.
        if not any(mark.is_inference() for mark in marks):
            self._known = [(tuple(map(Known, marks)), sizes, cut), *self._known[: _MOST - 1]]
        return cut

    def forget(self) -> None:
        """Forgets what was read."""
        self._known = []

    def _why_not(self, streams: Sequence[Stream], given: dict[str, Any]) -> str:
        if not streams:
            return "the call has no mask"
        for stream in streams:
            for name in (*stream.tokens, *stream.beside):
                if not isinstance(given.get(name), Tensor):
                    return f"{name} is no tensor, but {type(given.get(name)).__name__}"
            samples, others = given[stream.tokens[0]].shape[:1], given[stream.mark].shape[:1]
            if samples != others:
                return f"{stream.mark} has shape {tuple(given[stream.mark].shape)}, for {samples[0]} samples"
            if stream.is_raw and given[stream.mark].dtype != torch.bool:
                return f"its mask is of {given[stream.mark].dtype}, and not of torch.bool: it is added to the scores"
            sizes = {given[name].shape[stream.axis : stream.axis + 1] for name in stream.tokens}
            if len(sizes) != 1:
                return f"{' and '.join(stream.tokens)} differ in their tokens"
        return ""

    def _read(
        self, streams: Sequence[Stream], marks: Sequence[Tensor], sizes: Sequence[int], device: torch.device
    ) -> Cut:
        self.reads += 1
        found = []
        for stream, told, length in zip(streams, _to_host(streams, marks), sizes, strict=True):
            valid = stream.by.read(told, length)
            if not isinstance(valid, Valid):
                return Cut(self._row, remark=valid)
            found.append((stream, valid, length))
        return cut_of(self._row, found, device)


def _to_host(streams: Sequence[Stream], marks: Sequence[Tensor]) -> list[Tensor]:
    """What the marks tell, on the host: as one transfer, which is one sync."""
    asked = [stream.by.ask(mark) for stream, mark in zip(streams, marks, strict=True)]
    if len({each.device for each in asked}) > 1:
        return [each.to("cpu", torch.float32) for each in asked]
    told = torch.cat([each.reshape(-1).to(torch.float32) for each in asked]).cpu()
    parts = torch.split(told, [each.numel() for each in asked])
    return [part.view(each.shape) for part, each in zip(parts, asked, strict=True)]
