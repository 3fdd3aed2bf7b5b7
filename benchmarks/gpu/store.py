"""The file of a measurement: one entry for each part, written as soon as something is known."""

from __future__ import annotations

import gc
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion_accel import environment

_log = logging.getLogger(__name__)
_MESSAGE = 300
_FLAT_LIST = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")  # goes on one line, for people who read the file


class Store:
    """Results by part, in one JSON file that is written after each row.

    Args:
        path: The file; what it holds is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}

    def has(self, part: str) -> bool:
        """Whether a part was measured to its end; one that ended in an error counts."""
        return bool(self.result["parts"].get(part, {}).get("finished", False))

    def measure(self, part: str, run: Callable[[PartLog], None], device: torch.device) -> None:
        """Measures a part. Its error is its result, unless the device was lost by it.

        Args:
            part: Its name; what was there under it is replaced.
            run: Measures, and reports what it finds.
            device: Where.
        """
        entry: dict[str, Any] = {"environment": environment.describe(device), "about": {}, "rows": {}}
        self.result["parts"][part] = entry
        log = PartLog(entry, self.save)
        begin = time.perf_counter()
        try:
            run(log)
        except Exception as error:
            entry["error"] = _told(error)
            _log.exception("%s failed", part)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a device that is lost raises here: then the part counts as not measured
        entry |= {"seconds": time.perf_counter() - begin, "finished": True}
        self.save()

    def save(self) -> None:
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.result, indent=1, allow_nan=False, ensure_ascii=False)
        self.path.write_text(_FLAT_LIST.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n")


class PartLog:
    """Takes what a part finds.

    Args:
        entry: Of the part in the result.
        save: Writes the result.
    """

    def __init__(self, entry: dict[str, Any], save: Callable[[], None]) -> None:
        self._entry = entry
        self._save = save

    def about(self, **facts: Any) -> None:
        """Notes what is measured."""
        self._entry["about"] |= facts
        self._save()

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures one row. Its error is its result, and the next row is measured all the same."""
        try:
            found = measure()
        except Exception as error:
            found = {"error": _told(error)}
            _log.exception("%s failed", name)
        self._entry["rows"][name] = found
        self._save()
        if torch.cuda.is_available():
            gc.collect()  # what an error's traceback held, for one
            torch.cuda.empty_cache()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:_MESSAGE]}"
