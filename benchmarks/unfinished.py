"""What a run that was stopped has measured and calibrated: the next one goes on from it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Unfinished:
    """A folder with samples, a line each, and with what calibration made, a file each.

    Args:
        folder: Where they are; it is made when the first of them is kept.
        key: What must be the same for them to count, as JSON has it; otherwise they are thrown away.
        fresh: Throws them away in any case.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "wan"
        >>> Unfinished(folder, {"steps": 50}).add(("a caption", "reuse"), {"psnr": 40.0})
        >>> Unfinished(folder, {"steps": 50}).sample(("a caption", "reuse"))
        {'psnr': 40.0}
        >>> Unfinished(folder, {"steps": 20}).sample(("a caption", "reuse"))
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], fresh: bool = False) -> None:
        self._folder, self._lines, self._key = folder, folder / "samples.jsonl", json.loads(json.dumps(key))
        found = _read(self._lines)
        if fresh or not found or found[0] != self._key:
            self.drop()
            found = []
        self._samples: dict[tuple[str, ...], dict[str, Any]] = {tuple(name): sample for name, sample in found[1:]}
        if found:
            self._rewrite()

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._samples)

    def sample(self, name: tuple[str, ...]) -> dict[str, Any] | None:
        """The sample of that name, None if it is still to be measured."""
        return self._samples.get(name)

    def add(self, name: tuple[str, ...], sample: dict[str, Any]) -> None:
        """Keeps a sample."""
        self._begin()
        self._samples[name] = sample
        with self._lines.open("a") as file:
            file.write(json.dumps([name, sample]) + "\n")

    def product(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, or has returned before the run was stopped."""
        self._begin()
        path = self._folder / f"{name}.pickle"
        if path.exists():
            found: T = pickle.loads(path.read_bytes())
            return found
        made = make()
        _replace(path, pickle.dumps(made))
        return made

    def drop(self) -> None:
        """Throws all away."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._samples = {}

    def _begin(self) -> None:
        if not self._lines.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._rewrite()

    def _rewrite(self) -> None:
        """Without the line that the run was stopped in, which the next one would be appended to."""
        lines = [self._key, *map(list, self._samples.items())]
        _replace(self._lines, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _read(path: Path) -> list[Any]:
    """The lines of a file, without a last one that is not whole."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _replace(path: Path, content: bytes) -> None:
    """Writes a file; one that is stopped leaves the old one."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
