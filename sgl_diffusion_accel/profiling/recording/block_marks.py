"""Marks the block lists and the blocks of a transformer in traces. They are not timed."""

from __future__ import annotations

import threading

from sgl_diffusion_accel.profiling.recording.recorder import Recorder


class _UnderWay(threading.local):
    """The block list that is under way in one thread."""

    name: str | None = None


class BlockMarks:
    """What is marked of one transformer: at most one of its block lists is under way in a thread.

    Args:
        recorder: Is told.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._under_way = _UnderWay()

    def open(self, list_name: str, index: int) -> bool:
        """A block begins; outside of a pipeline call nothing does."""
        if self._recorder.call is None:
            return False
        if self._under_way.name != list_name:
            self.close()
            self._under_way.name = list_name
            self._recorder.mark(list_name)
        self._recorder.mark(f"{list_name}.{index}")
        return True

    def shut(self, is_last: bool) -> None:
        """A block ends, and with the last one its list."""
        self._recorder.unmark()
        if is_last:
            self.close()

    def close(self) -> None:
        """The block list that is under way is over."""
        if self._under_way.name is not None:
            self._under_way.name = None
            self._recorder.unmark()
