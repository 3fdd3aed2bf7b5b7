"""What is seen inside of one call of a transformer: time by list of blocks, masked attention, memory of tensors."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


@contextmanager
def block_seconds(transformer: nn.Module, paths: Iterable[str]) -> Iterator[Mapping[str, float]]:
    """CPU seconds of this thread by list of blocks.

    Args:
        transformer: The model.
        paths: Names of its lists of blocks.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    begun: list[float] = []

    def begin(*_: Any) -> None:
        begun.append(time.thread_time())

    def end(path: str) -> Callable[..., None]:
        def ended(*_: Any) -> None:
            spent[path] += time.thread_time() - begun.pop()

        return ended

    hooks = []
    for path in paths:
        for block in _list(transformer, path):
            hooks += [block.register_forward_pre_hook(begin), block.register_forward_hook(end(path))]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


class AttentionCalls(TorchFunctionMode):
    """Counts attention calls within lists of blocks, while it is entered.

    Args:
        transformer: The model.
        paths: Names of its lists of blocks.

    Attributes:
        all: Calls.
        masked: Those of them with a mask.
    """

    def __init__(self, transformer: nn.Module, paths: Iterable[str]) -> None:
        super().__init__()
        self.all = self.masked = self._inside = 0
        self._hooks = []
        for path in paths:
            for block in _list(transformer, path):
                self._hooks.append(block.register_forward_pre_hook(lambda *_: self._step(1)))
                self._hooks.append(block.register_forward_hook(lambda *_: self._step(-1)))

    def _step(self, by: int) -> None:
        self._inside += by

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts a call of PyTorch's attention, and makes it."""
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self._inside:
            self.all += 1
            self.masked += (args[3] if len(args) > 3 else kwargs.get("attn_mask")) is not None
        return function(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        """Counts no more."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()


def tensor_peak(call: Callable[[], T]) -> tuple[T, int]:
    """What a call returns, and the most bytes of tensors that it held at one time beyond those that were there.

    What PyTorch allocates on the host, as its profiler notes it: the same on any machine, whatever the allocator of
    the system keeps for later, and the like of `torch.cuda.max_memory_allocated`.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    notes = sorted((each for each in events if each["name"] == "[memory]"), key=lambda each: each["args"]["Ev Idx"])
    totals = [each["args"]["Total Allocated"] for each in notes]
    return output, max(totals) - (totals[0] - notes[0]["args"]["Bytes"])


def _list(transformer: nn.Module, path: str) -> Iterable[nn.Module]:
    found = transformer.get_submodule(path)
    if not isinstance(found, nn.ModuleList):
        raise TypeError(f"{path} is no list of blocks, but {type(found).__name__}")
    return found
