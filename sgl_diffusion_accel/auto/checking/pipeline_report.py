"""What `check_pipeline` returns: what was found, and what each patch can do with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape

from sgl_diffusion_accel.auto.checking.findings import Denoiser, FoundLoop, FoundScheduler, Verdict
from sgl_diffusion_accel.reporting.tables import Table

FORMAT = 1


@dataclass(frozen=True)
class PipelineReport:
    """What `check_pipeline` returns; `print` shows it, a notebook as tables.

    Attributes:
        pipeline: Name of the pipeline's class, or of the transformer's.
        denoisers: Its transformers, in the order in which a run uses them.
        loop: Its denoising loop.
        scheduler: Its scheduler.
        patches: A verdict on each patch of this library.
    """

    pipeline: str
    denoisers: tuple[Denoiser, ...]
    loop: FoundLoop
    scheduler: FoundScheduler
    patches: tuple[Verdict, ...]

    def verdict(self, patch: str) -> Verdict:
        """The verdict on a patch, by its name.

        Raises:
            KeyError: There is no patch of that name.
        """
        found = {each.patch: each for each in self.patches}
        return found[patch]

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def __repr__(self) -> str:
        answers = ", ".join(f"{each.patch} {each.answer}" for each in self.patches)
        return f"<PipelineReport: {self.pipeline}; {answers}; see print(report)>"

    def __str__(self) -> str:
        lines = [self.pipeline, *(f"  {line}" for line in self._facts()), "", self._table(reasons=False).to_text(), ""]
        return "\n".join(lines + [f"{each.patch}: {each.reason}" for each in self.patches])

    def _repr_html_(self) -> str:
        facts = "".join(f"<li>{escape(line)}</li>" for line in self._facts())
        return f"<div><b>{escape(self.pipeline)}</b><ul>{facts}</ul>{self._table(reasons=True).to_html()}</div>"

    def _facts(self) -> list[str]:
        return [
            *(line for each in self.denoisers for line in _of_denoiser(each)),
            *self._of_loop(),
            self.scheduler.what,
        ]

    def _of_loop(self) -> list[str]:
        loop = self.loop
        placed = "calls are placed" if loop.is_placed else "whether calls are placed is not known"
        lines = [f"loop: {placed}: {loop.how}"]
        if loop.branches:
            batch = "; cond and uncond come as one batch, and share what is decided" if loop.is_batched else ""
            lines.append(f"branches: {', '.join(loop.branches)}{batch}")
        return lines

    def _table(self, reasons: bool) -> Table:
        rows = [
            (each.patch, each.answer, _held(each), each.call, *([each.reason] if reasons else []))
            for each in self.patches
        ]
        return Table(("patch", "acts", "holds in a run", "type", *(["why"] if reasons else [])), rows, words=range(5))


def gibibytes(size: int) -> str:
    """A size in words."""
    for unit, bytes_of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size} B"


def _held(verdict: Verdict) -> str:
    return verdict.memory if verdict.held_bytes is None else f"about {gibibytes(verdict.held_bytes)}"


def _counted(count: int) -> str:
    for word, size in (("billion", 10**9), ("million", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def _of_denoiser(found: Denoiser) -> list[str]:
    weights = ", ".join(f"{gibibytes(size)} in {dtype}" for dtype, size in found.weights.items())
    loaded = "" if found.is_loaded else " (not loaded)"
    lists = ", ".join(f"{name} {count}" for name, count in found.blocks.items()) or "none that is known"
    return [
        f"{found.component}: {found.model}, {_counted(found.parameters)} parameters, {weights}{loaded}",
        f"  blocks: {lists}; {found.wiring}",
        f"  attention backends here: {', '.join(found.attention) or 'none but its own'}",
    ]
