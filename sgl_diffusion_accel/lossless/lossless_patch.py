"""The patch that `apply_lossless` leaves on a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from sgl_diffusion_accel.lossless.both_ways import Verification
from sgl_diffusion_accel.lossless.call_handler import KIND, CallHandler, Part
from sgl_diffusion_accel.lossless.constants.equal_timesteps import EqualTimesteps
from sgl_diffusion_accel.lossless.constants.idle_guidance import IdleGuidance
from sgl_diffusion_accel.lossless.constants.once_a_run import OnceARun
from sgl_diffusion_accel.lossless.lossless_config import LosslessConfig
from sgl_diffusion_accel.lossless.padding.cuts import Trimmed
from sgl_diffusion_accel.lossless.padding.trimming import MaskHandler, Padding
from sgl_diffusion_accel.patch import Patch
from sgl_diffusion_accel.targets import Target


@dataclass(frozen=True)
class LosslessStats:
    """What was not computed.

    Attributes:
        calls: Component to what was cut of its calls, with how many they were.
        timesteps: Component to what was found of its tokens' timesteps, with how many calls.
        idle: Component to how many of its calls were left out, since guidance multiplies them by 0.
        spared: Component to how often a part of it was not computed, since its output of the run was known.
        reads: Component to how often its masks and timesteps were read from the device.
        verified: Component to the largest relative difference of the calls that were made both ways.
    """

    calls: Mapping[str, Mapping[Trimmed, int]]
    timesteps: Mapping[str, Mapping[str, int]]
    idle: Mapping[str, int]
    spared: Mapping[str, int]
    reads: Mapping[str, int]
    verified: Mapping[str, float]


class LosslessPatch(Patch):
    """What cannot matter, cut from the calls of a pipeline's transformers.

    Attributes:
        config: The settings that it was applied with.
        left_alone: Component to why its padding is not cut.
        not_constant: Component to why what may be constant in a run is not, or is not known to be.
    """

    def __init__(self, config: LosslessConfig) -> None:
        super().__init__(KIND)
        self.config = config
        self.left_alone: dict[str, str] = {}
        self.not_constant: dict[str, str] = {}
        self._parts: dict[str, Sequence[Part]] = {}
        self._idle: dict[str, IdleGuidance] = {}
        self._verifications: dict[str, Verification] = {}
        self._models: dict[str, str] = {}

    @property
    def stats(self) -> LosslessStats:
        """What was not computed, up to now."""
        parts = [(name, part) for name, parts in self._parts.items() for part in parts]
        paddings = {name: part for name, part in parts if isinstance(part, Padding)}
        timesteps = {name: part for name, part in parts if isinstance(part, EqualTimesteps)}
        reads = {name: part.reader.reads for name, part in paddings.items()}
        reads |= {name: part.reads + reads.get(name, 0) for name, part in timesteps.items()}
        return LosslessStats(
            calls={name: dict(part.seen) for name, part in paddings.items()},
            timesteps={name: dict(part.seen) for name, part in timesteps.items()},
            idle={name: each.skipped for name, each in self._idle.items()},
            spared={name: part.spared for name, part in parts if isinstance(part, OnceARun)},
            reads=reads,
            verified={name: each.worst for name, each in self._verifications.items()},
        )

    def held_bytes(self) -> int:
        """Bytes of the tensors that are kept for the runs under way; 0 between runs."""
        parts = [part for parts in self._parts.values() for part in parts if isinstance(part, OnceARun)]
        idle = sum(each.held_bytes() for each in self._idle.values())
        return idle + sum(part.held_bytes() for part in parts)

    def attach(self, target: Target, parts: Sequence[Part], verification: Verification | None) -> None:
        """Puts the patch in front of a transformer, and of those blocks that are handed a mask."""
        self._models[target.name], self._parts[target.name] = target.model, parts
        if verification is not None:
            self._verifications[target.name] = verification
        self.stand_before(target, CallHandler(self, target, parts))
        for part in parts:
            if isinstance(part, Padding) and part.blocks is not None and not part.masks.is_compiled:
                for block in part.masks.blocks:
                    self.intercept(block, MaskHandler(self, part.dropping, part.blocks))
            if isinstance(part, OnceARun):
                part.attach(self)

    def spare_idle_calls(self, target: Target) -> None:
        """Stands before a second expert and its caches, to leave out calls that guidance multiplies by 0."""
        self._models[target.name], self._idle[target.name] = target.model, IdleGuidance(self, target)
        self.stand_before(target, self._idle[target.name], beside="guidance")

    def leave_alone(self, target: Target, why: str) -> None:
        """Notes that no padding of a transformer is cut."""
        self._models[target.name], self.left_alone[target.name] = target.model, why

    def _on_taken_off(self) -> None:
        for parts in self._parts.values():
            for part in parts:
                part.forget()
        for each in self._idle.values():
            each.forget()

    def _what(self) -> str:
        acts = [f"{name}: {', '.join(part.line() for part in parts)}" for name, parts in self._parts.items()]
        acts += [f"{name}: left alone" for name in self.left_alone if name not in self._parts]
        return f"lossless on {'; '.join(acts)}"

    def __str__(self) -> str:
        lines = [f"lossless{f' [{self.notice}]' if self.notice else ''}"]
        for name, model in self._models.items():
            lines.append(f"  {name} ({model})")
            lines += [f"    {line}" for part in self._parts.get(name, ()) for line in part.lines()]
            lines += [f"    {self._idle[name].line()}"] if name in self._idle else []
            if name in self.left_alone:
                lines.append(f"    its padding is left alone: {self.left_alone[name]}")
            if name in self.not_constant:
                lines.append(f"    keys and values of its text are computed: {self.not_constant[name]}")
            if name in self._verifications:
                lines.append(f"    made both ways: {self._verifications[name]}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"
