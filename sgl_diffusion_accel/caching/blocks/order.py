"""Checks, on every transformer call, that the blocks are called as a cache takes for granted."""

from __future__ import annotations

from sgl_diffusion_accel.caching.blocks.cached_model import CachedModel
from sgl_diffusion_accel.errors import UnsupportedModelError


class BlockOrder:
    """Each list from its first block to its last, once a call, and one list after the other.

    Where it is not so (interleaved or repeated lists, blocks left out), what the span adds is not the difference
    between what leaves it and what enters it, and a cache would be wrong without a word.

    Args:
        model: The cached transformer.
    """

    def __init__(self, model: CachedModel) -> None:
        self._model = model
        self._lists: dict[int, int] = {}  # index of the last block that was called, by list, in the order of the calls

    @property
    def started(self) -> bool:
        """Whether any block has been called."""
        return bool(self._lists)

    @property
    def is_complete(self) -> bool:
        """Whether all blocks of all lists have been called."""
        counts = [blocks.count for blocks in self._model.parts.layout.lists]
        return [self._lists.get(index) for index in range(len(counts))] == [count - 1 for count in counts]

    def enter(self, list_index: int, index: int) -> None:
        """Notes that a block is called.

        Raises:
            UnsupportedModelError: It is not the block whose turn it is.
        """
        current = next(reversed(self._lists), None)
        if list_index == current and index == self._lists[list_index] + 1:
            self._lists[list_index] = index
            return
        if current is not None:
            self._check_ended(current)
        if list_index in self._lists or index != 0:
            self._refuse(f"block {index} of {self._model.where(list_index)} is called out of turn")
        self._lists[list_index] = index

    def passed(self, list_index: int, count: int) -> None:
        """Notes that some more blocks of a list, skipped ones, have been called in its order."""
        self._lists[list_index] += count

    def finish(self) -> None:
        """Notes that the transformer call has ended.

        Raises:
            UnsupportedModelError: The last blocks of a list have not been called.
        """
        current = next(reversed(self._lists), None)
        if current is not None:
            self._check_ended(current)

    def _check_ended(self, list_index: int) -> None:
        count = self._model.parts.layout.lists[list_index].count
        if self._lists[list_index] != count - 1:
            called = self._lists[list_index] + 1
            self._refuse(f"only {called} of the {count} blocks of {self._model.where(list_index)} are called in a row")

    def _refuse(self, seen: str) -> None:
        raise UnsupportedModelError(
            f"{seen}. A cache needs lists of blocks that run from the first to the last, once in each call and one "
            "list after the other. This model cannot be cached."
        )
