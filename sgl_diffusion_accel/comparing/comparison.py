"""`ComparisonReport`: the numbers of a comparison with their tables, pictures and files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion_accel.comparing import comparison_tables, cost_plots, picture_sheet
from sgl_diffusion_accel.comparing.comparison_data import Baseline, ComparisonData, Row, Sample
from sgl_diffusion_accel.comparing.picture_gallery import Gallery
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.reporting.spread import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1


@dataclass(frozen=True)
class ComparisonReport(ComparisonData):
    """What `compare` returns; `print` shows a table, a notebook the table with pictures."""

    def to_markdown(self) -> str:
        """A table with what was measured on what above it, and remarks below it."""
        return comparison_tables.markdown(self)

    def to_json(self) -> str:
        """All numbers as strict JSON; infinite ones and NaN as the text "inf", "-inf" and "nan". No pictures."""
        plain = dataclasses.asdict(dataclasses.replace(self, gallery=Gallery()))
        del plain["gallery"]
        return json.dumps(_strict({"format": FORMAT, **plain}), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes `to_json()` to a file; its folder is made if needed."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ComparisonReport:
        """Reads what `save` wrote.

        Raises:
            ConfigError: The file is something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found.pop("format") != FORMAT:
                raise ConfigError(f"{path} was written by another version of sgl_diffusion_accel.")
            return cls(**_decoded(found))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is no report that compare(...).save(path) has written: {error!r}.") from error

    def plot(self, path: str | Path | None = None, *, x: str | None = None) -> Figure:
        """Draws PSNR over the cost of every contender, with the curve of simply fewer steps.

        Args:
            path: PNG (or PDF, SVG) to write; None writes nothing.
            x: `"compute_ratio"` or `"speedup"`; None takes the first where it is known and differs from 1.

        Raises:
            ConfigError: `x` is something else.
            MissingPackageError: matplotlib is missing.
        """
        return cost_plots.pareto(self, path, x)

    def plot_pictures(self, path: str | Path | None = None) -> Figure:
        """Draws the outputs side by side, below each how it differs from the unpatched one, magnified.

        Args:
            path: PNG to write; None writes nothing.

        Raises:
            ConfigError: There are no pictures: the report was loaded, or the outputs are packed latents.
            MissingPackageError: matplotlib is missing.
        """
        return picture_sheet.side_by_side(self, path)

    def plot_steps(self, path: str | Path | None = None) -> Figure:
        """Draws which steps each cache computed in the first call, a line for each branch.

        Args:
            path: PNG to write; None writes nothing.

        Raises:
            ConfigError: No variant was a cache of this library.
            MissingPackageError: matplotlib is missing.
        """
        return cost_plots.step_maps(self, path)

    def __str__(self) -> str:
        return comparison_tables.text(self)

    def _repr_html_(self) -> str:
        figures = {"Quality over cost": self.plot, "Steps": self.plot_steps, "Pictures": self.plot_pictures}
        return comparison_tables.html(self, figures)


def _strict(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of a report."""
    baseline = _spread(found["unpatched"], "seconds")
    rows = [_spread(row, "speedup_spread") for row in found["rows"]]
    samples = [tuple(_decoded_sample(each) for each in row.pop("samples")) for row in rows]
    return found | {
        **{key: tuple(found[key]) for key in ("calls", "steps", "remarks")},
        "order": tuple(map(tuple, found["order"])),
        "unpatched": Baseline(**_numbers(baseline)),
        "rows": tuple(Row(**_numbers(row), samples=each) for row, each in zip(rows, samples, strict=True)),
    }


def _decoded_sample(found: dict[str, Any]) -> Sample:
    maps = {branch: tuple(steps) for branch, steps in found.pop("maps").items()}
    return Sample(maps=maps, **_numbers(found))


def _spread(found: dict[str, Any], key: str) -> dict[str, Any]:
    return found | {key: Spread(**_numbers(found[key]))}


def _numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with the text of infinite numbers and NaN turned back; a name stays text."""
    return {key: float(value) if isinstance(value, str) and key != "name" else value for key, value in found.items()}
