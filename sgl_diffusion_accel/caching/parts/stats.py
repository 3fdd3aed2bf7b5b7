"""What a cache did, run by run: which denoising steps were computed, which skipped, and why."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sgl_diffusion_accel.caching.parts.policies import Decision

_KEPT_RUNS = 64


@dataclass(frozen=True)
class StepRecord:
    """One transformer call.

    Attributes:
        step: Index of the denoising step.
        component: Which transformer, such as `"transformer_2"`.
        computed: Whether the span was computed.
        reason: Why.
        change: Relative change of the signal, where it was measured.
        blocks_run: Blocks that were executed.
        blocks: Blocks that the transformer has.
    """

    step: int
    component: str
    computed: bool
    reason: str
    change: float | None
    blocks_run: int
    blocks: int


@dataclass
class BranchStats:
    """What happened on one branch (cond, uncond, …) of a run.

    Attributes:
        records: One record for each denoising step, in order.
    """

    records: list[StepRecord] = field(default_factory=list)

    @property
    def computed(self) -> tuple[bool, ...]:
        """Whether the span was computed, one entry a step."""
        return tuple(record.computed for record in self.records)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, one entry a step."""
        return tuple(record.reason for record in self.records)

    @property
    def changes(self) -> tuple[float | None, ...]:
        """Relative change of the signal where it was measured, one entry a step."""
        return tuple(record.change for record in self.records)

    @property
    def components(self) -> tuple[str, ...]:
        """Which transformer ran, one entry a step."""
        return tuple(record.component for record in self.records)


@dataclass
class RunStats:
    """What happened in one run of a pipeline.

    Attributes:
        steps: Number of denoising steps that the run has.
        branches: By name.
        remarks: What the user should know about the run, as (component, remark).
    """

    steps: int
    branches: dict[str, BranchStats] = field(default_factory=dict)
    remarks: list[tuple[str, str]] = field(default_factory=list)

    @property
    def compute_share(self) -> float:
        """Share of all block calls that were executed, head and tail included; 1.0 means that nothing was skipped."""
        records = [record for branch in self.branches.values() for record in branch.records]
        blocks = sum(record.blocks for record in records)
        return sum(record.blocks_run for record in records) / blocks if blocks else 1.0

    def remark(self, component: str, remark: str) -> None:
        """Adds what the user should know, once."""
        if (component, remark) not in self.remarks:
            self.remarks.append((component, remark))

    def add(self, branch: str, step: int, component: str, decision: Decision, blocks_run: int, blocks: int) -> None:
        """Records one transformer call."""
        record = StepRecord(step, component, decision.compute, decision.reason, decision.change, blocks_run, blocks)
        self.branches.setdefault(branch, BranchStats()).records.append(record)


@dataclass
class Stats:
    """What a patch did since it was applied.

    Attributes:
        started: Runs in all.
        unplaced: Transformer calls that could not be placed in a denoising loop, by what was missing. They were
            computed in full.
    """

    started: int = 0
    unplaced: dict[str, int] = field(default_factory=dict)
    _runs: deque[RunStats] = field(default_factory=lambda: deque(maxlen=_KEPT_RUNS))

    @property
    def outside(self) -> int:
        """Transformer calls that could not be placed in a denoising loop; they were computed in full."""
        return sum(self.unplaced.values())

    def add_unplaced(self, missing: str) -> bool:
        """Counts a call that could not be placed; returns whether it is the first one for which that was missing."""
        self.unplaced[missing] = self.unplaced.get(missing, 0) + 1
        return self.unplaced[missing] == 1

    @property
    def runs(self) -> tuple[RunStats, ...]:
        """The last runs, oldest first (at most 64)."""
        return tuple(self._runs)

    def start(self, steps: int) -> RunStats:
        """Begins the record of a new run."""
        self.started += 1
        run = RunStats(steps)
        self._runs.append(run)
        return run
