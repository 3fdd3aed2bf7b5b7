"""What `compare` found out: plain data that can be saved, with tables and pictures of it."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion_accel.comparing import tables
from sgl_diffusion_accel.comparing.shots import Gallery
from sgl_diffusion_accel.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some values; of a single one all three are that."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Sample:
    """One run against the unpatched run of its round.

    Attributes:
        call: Index of the call.
        seconds: Wall time.
        speedup: Wall time of the unpatched run over that of this one.
        share: Share of the blocks that were computed; for fewer steps, of the steps. None if not known.
        peak_memory_mib: Of the CUDA device; None without one.
        psnr: In dB; infinite for equal outputs.
        ssim: Structural similarity.
        lpips: Learned perceptual distance.
        sharpness: Relative to the unpatched output's.
        motion: Temporal difference relative to the unpatched clip's; None for pictures.
        non_finite: Share of values that are NaN or infinite.
        maps: Branch to whether each step was computed, where a cache of this library was on.
    """

    call: int
    seconds: float
    speedup: float
    share: float | None
    peak_memory_mib: float | None
    psnr: float
    ssim: float | None
    lpips: float | None
    sharpness: float | None
    motion: float | None
    non_finite: float
    maps: Mapping[str, tuple[bool, ...]]


@dataclass(frozen=True)
class Row:
    """One contender, over all its runs. Metrics that cannot be had are None; `ComparisonReport.remarks` tells why.

    Attributes:
        name: As the variant was named; `"25 steps"` for fewer steps.
        is_fewer_steps: Whether it is the unpatched pipeline with fewer steps.
        speedup: Median of the paired ratios, unpatched over this.
        speedup_spread: The same with its quartiles.
        seconds: Median wall time of a run.
        compute_ratio: Blocks that the unpatched runs compute over those that were computed, all branches together.
        peak_memory_mib: Most of all runs, on the CUDA device; None without one.
        psnr: Mean over the runs in dB, an equal output counted as 100; infinite if all are equal.
        psnr_worst: Of all runs.
        ssim: Mean structural similarity.
        lpips: Mean learned perceptual distance.
        sharpness: Mean, relative to the unpatched: 1 as sharp, less is softer.
        motion: Mean temporal difference, relative to the unpatched: 1 as much, 0 frozen; None for pictures.
        fewer_steps_psnr: PSNR of simply fewer steps at the same compute ratio, where it was measured.
        samples: What the row is made of.
    """

    name: str
    is_fewer_steps: bool
    speedup: float
    speedup_spread: Spread
    seconds: float
    compute_ratio: float | None
    peak_memory_mib: float | None
    psnr: float
    psnr_worst: float
    ssim: float | None
    lpips: float | None
    sharpness: float | None
    motion: float | None
    fewer_steps_psnr: float | None
    samples: tuple[Sample, ...]

    @property
    def beats_fewer_steps(self) -> bool:
        """Whether it is nearer to the unpatched output than fewer steps at the same cost are."""
        return self.fewer_steps_psnr is not None and self.psnr > self.fewer_steps_psnr


@dataclass(frozen=True)
class Baseline:
    """The unpatched runs.

    Attributes:
        seconds: Wall time of a run.
        peak_memory_mib: Most of all runs, on the CUDA device; None without one.
        repeats_itself_db: PSNR of two unpatched runs on the same seed: infinite if they are equal, None if no call was
            run twice.
    """

    seconds: Spread
    peak_memory_mib: float | None
    repeats_itself_db: float | None


@dataclass(frozen=True)
class ComparisonReport:
    """What `compare` returns; `print` shows a table, a notebook the table with pictures.

    Attributes:
        pipeline: Class of the pipeline.
        calls: A name for each call: its prompt, or its number.
        steps: Denoising steps of each call, None where they are not set by `num_inference_steps`.
        repeats: Runs of each contender on each call.
        warmup: Rounds that were not measured.
        measured_on: What the metrics were taken on, and the range that PSNR refers to.
        environment: Versions, hardware, date.
        unpatched: The runs that all others are compared with.
        rows: The variants in their order, then fewer steps.
        order: Contenders of each measured round, in the order in which they ran.
        remarks: What the reader should know: metrics that are missing, NaN, a pipeline that does not repeat itself.
        gallery: The pictures; empty in a report that was loaded.
    """

    pipeline: str
    calls: tuple[str, ...]
    steps: tuple[int | None, ...]
    repeats: int
    warmup: int
    measured_on: str
    environment: Mapping[str, Any]
    unpatched: Baseline
    rows: tuple[Row, ...]
    order: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]
    gallery: Gallery = field(default_factory=Gallery, compare=False, repr=False)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; known: {', '.join(repr(row.name) for row in self.rows)}")

    def to_markdown(self) -> str:
        """A table with what was measured on what above it, and remarks below it."""
        return tables.markdown(self)

    def to_json(self) -> str:
        """All numbers as strict JSON; infinite ones and NaN as the text "inf", "-inf" and "nan". No pictures."""
        plain = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "gallery"}
        return json.dumps(_encoded({"format": FORMAT, **plain}), indent=1, allow_nan=False) + "\n"

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
            return _decoded(found)
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
        from sgl_diffusion_accel.comparing import plots

        return plots.pareto(self, path, x)

    def plot_pictures(self, path: str | Path | None = None) -> Figure:
        """Draws the outputs side by side, below each how it differs from the unpatched one, magnified.

        Args:
            path: PNG to write; None writes nothing.

        Raises:
            ConfigError: There are no pictures: the report was loaded, or the outputs are packed latents.
            MissingPackageError: matplotlib is missing.
        """
        from sgl_diffusion_accel.comparing import pictures

        return pictures.side_by_side(self, path)

    def plot_steps(self, path: str | Path | None = None) -> Figure:
        """Draws which steps each cache computed in the first call, a line for each branch.

        Args:
            path: PNG to write; None writes nothing.

        Raises:
            ConfigError: No variant was a cache of this library.
            MissingPackageError: matplotlib is missing.
        """
        from sgl_diffusion_accel.comparing import plots

        return plots.step_maps(self, path)

    def __str__(self) -> str:
        return tables.text(self)

    def _repr_html_(self) -> str:
        return tables.html(self)


def _encoded(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _encoded(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _encoded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(found: dict[str, Any]) -> ComparisonReport:
    rows = tuple(
        Row(
            **_numbers({key: value for key, value in row.items() if key not in ("samples", "speedup_spread")}),
            speedup_spread=Spread(**_numbers(row["speedup_spread"])),
            samples=tuple(_decoded_sample(sample) for sample in row["samples"]),
        )
        for row in found.pop("rows")
    )
    baseline = found.pop("unpatched")
    lists: dict[str, Any] = {key: tuple(found.pop(key)) for key in ("calls", "steps", "remarks")}
    return ComparisonReport(
        **lists,
        order=tuple(map(tuple, found.pop("order"))),
        unpatched=Baseline(seconds=Spread(**_numbers(baseline.pop("seconds"))), **_numbers(baseline)),
        rows=rows,
        **found,
    )


def _decoded_sample(found: dict[str, Any]) -> Sample:
    maps = {branch: tuple(steps) for branch, steps in found.pop("maps").items()}
    return Sample(maps=maps, **_numbers(found))


def _numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with the text of infinite numbers and NaN turned back; a name stays text."""
    return {key: float(value) if isinstance(value, str) and key != "name" else value for key, value in found.items()}
