"""`ProfileReport`: the timings of a profile with their tables and their timeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.profiling.results import timeline, timing_tables
from sgl_diffusion_accel.profiling.results.timings import ProfileData


@dataclass(frozen=True)
class ProfileReport(ProfileData):
    """What a profile measured. `print` shows its last call as a table."""

    def plot(self, path: str | Path, call: int = -1) -> Path:
        """Draws the timeline of a call: its stages, its steps, what the cache did.

        Args:
            path: PNG to write; its folder is made if needed.
            call: Which call.

        Returns:
            The path.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ConfigError: Nothing was measured.
        """
        return timeline.draw(self.call(call), Path(path))

    def __str__(self) -> str:
        return timing_tables.text(self)

    def __rich__(self) -> Any:
        return timing_tables.rich_group(self)

    def _repr_html_(self) -> str:
        return timing_tables.html(self)
