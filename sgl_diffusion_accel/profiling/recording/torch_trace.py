"""The torch profiler, and where its Chrome traces go."""

from __future__ import annotations

import datetime
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

_DIRECTORIES = ("SGLANG_DIFFUSION_TORCH_PROFILER_DIR", "SGLANG_TORCH_PROFILER_DIR")
_ACTIVITIES = (ProfilerActivity.CPU, ProfilerActivity.CUDA, ProfilerActivity.XPU)


def default_directory() -> Path:
    """Where traces go unless a folder is named: as the environment of SGLang-Diffusion says, else `logs`."""
    return Path(next((found for name in _DIRECTORIES if (found := os.environ.get(name))), "logs"))


class TorchEmitter:
    """Records with the torch profiler; each window becomes one trace.

    Args:
        record_shapes: Whether to record the shapes of operators' inputs.
        with_stack: Whether to record the lines of code.
        profile_memory: Whether to record what operators allocate.
    """

    def __init__(self, record_shapes: bool, with_stack: bool, profile_memory: bool) -> None:
        self._options: dict[str, Any] = {
            "record_shapes": record_shapes,
            "with_stack": with_stack,
            "profile_memory": profile_memory,
        }
        self._profiler: Any = None
        self._label: str | None = None
        self._open: list[Any] = []
        self._finished: list[tuple[str, datetime.datetime, Any]] = []

    def prepare(self) -> None:
        """Sets the profiler up, so that what this costs falls into the warm-up.

        Raises:
            RuntimeError: Another torch profiler is running, which this one would end.
        """
        if is_recording():
            raise RuntimeError("another torch profiler is running in this process")
        available = supported_activities()  # type: ignore[no-untyped-call]
        activities = [each for each in _ACTIVITIES if each in available]
        self._profiler = profile(activities=activities, acc_events=True, **self._options)
        self._profiler.prepare_trace()

    def start(self, label: str) -> None:
        """Begins a trace."""
        if self._profiler is None:
            self.prepare()
        self._profiler.start_trace()
        self._label = label

    def stop(self) -> None:
        """Ends the trace; one that was only prepared is dropped."""
        profiler, label = self._profiler, self._label
        self._profiler = self._label = None
        if profiler is None:
            return
        if label is None:
            profiler.start_trace()
        profiler.stop_trace()
        if label is not None:
            self._finished.append((label, datetime.datetime.now(), profiler))

    def push(self, name: str) -> None:
        """Opens a range."""
        made: Any = torch.autograd.profiler.record_function(name)
        made.__enter__()
        self._open.append(made)

    def pop(self) -> None:
        """Closes the last one."""
        self._open.pop().__exit__(None, None, None)

    def write(self, folder: Path) -> list[Path]:
        """Writes the traces that are finished into a folder, and lets go of them.

        Raises:
            OSError: A file cannot be written.
        """
        written = []
        while self._finished:
            label, ended, profiler = self._finished.pop(0)
            path = new_file(folder, f"{label}-global-rank{rank()}-{ended:%Y%m%d-%H%M%S}", ".trace.json.gz")
            profiler.export_chrome_trace(str(path))
            written.append(path)
        return written


def is_recording() -> bool:
    """Whether some torch profiler is running in this process."""
    return bool(torch.autograd.profiler._is_profiler_enabled)


def new_file(folder: Path, name: str, ending: str) -> Path:
    """Makes an empty file of a name that no file in the folder has: with a number where the name is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{name}{'' if number == 1 else f'-{number}'}{ending}"
        try:
            path.open("x").close()
        except FileExistsError:
            continue
        break
    return path


def rank() -> int:
    """The rank of this process among those that work together, 0 for one alone."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
