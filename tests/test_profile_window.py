"""The traced part of a run, with an emitter that writes down what it is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from invariants.families import present
from sgl_diffusion_accel.profiling import profile as module
from sgl_diffusion_accel.profiling.profile import Profile
from sgl_diffusion_accel.profiling.profile_settings import ProfileSettings
from sgl_diffusion_accel.profiling.recording.nvtx import NvtxEmitter
from sgl_diffusion_accel.profiling.recording.trace_window import Window


class Recording:
    """Checks that ranges are nested, and come between start and stop alone."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.open: list[str] = []
        self.is_on = False

    def prepare(self) -> None:
        self.log.append("prepare")

    def start(self, label: str) -> None:
        assert not self.is_on
        self.is_on = True
        self.log.append(f"start {label}")

    def stop(self) -> None:
        assert self.open == []
        self.is_on = False
        self.log.append("stop")

    def push(self, name: str) -> None:
        assert self.is_on
        self.open.append(name)
        self.log.append(name)

    def pop(self) -> None:
        assert self.is_on
        self.open.pop()


class Failing(Recording):
    def start(self, label: str) -> None:
        raise RuntimeError("no profiler here")


def loop(window: Window, steps: int) -> None:
    for step in range(steps):
        if window.is_due(step, steps):
            window.before_step(step, steps, "Pipe")
        window.push(f"step {step}")
        window.pop()
    window.leave_loop()


@pytest.mark.parametrize(
    ("steps", "total", "log"),
    [
        (2, 5, ["prepare", "start Pipe-2_steps", "outer", "step 1", "step 2", "stop"]),
        (9, 3, ["prepare", "start Pipe-2_steps", "outer", "step 1", "step 2", "stop"]),
        (-1, 2, ["start Pipe-2_steps", "outer", "step 0", "step 1", "stop"]),
        (2, 1, ["start Pipe-1_steps", "outer", "step 0", "stop"]),
    ],
)
def test_warm_up_then_the_chosen_steps(steps: int, total: int, log: list[str]) -> None:
    window = Window(emitter := Recording(), steps, all_stages=False)
    window.begin_call("Pipe")
    window.push("outer")
    loop(window, total)
    window.pop()
    window.end_call()
    assert emitter.log == log
    assert emitter.open == []


def test_all_stages_are_from_the_beginning_to_the_end() -> None:
    window = Window(emitter := Recording(), 5, all_stages=True)
    window.begin_call("Pipe")
    window.push("Pipe")
    loop(window, 2)
    window.pop()
    window.end_call()
    assert emitter.log == ["start Pipe-full_stages", "Pipe", "step 0", "step 1", "stop"]


def test_ranges_of_another_thread_pass_by() -> None:
    emitter = Recording()
    window = Window(emitter, steps=2, all_stages=False)

    def elsewhere() -> None:
        window.push("elsewhere")
        loop(window, 5)
        assert not window.is_recording_here
        window.pop()

    for step in range(3):
        window.before_step(step, 5, "Pipe")
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert window.is_recording_here
    window.leave_loop()
    assert emitter.log == ["prepare", "start Pipe-2_steps", "stop"]
    elsewhere_first = threading.Thread(target=loop, args=(window, 3))
    elsewhere_first.start()
    elsewhere_first.join()
    assert emitter.log[3:] == ["prepare", "start Pipe-2_steps", "step 1", "step 2", "stop"]


def test_open_ranges_are_closed_before_the_end() -> None:
    window = Window(emitter := Recording(), 1, all_stages=False)
    window.push("outer")
    window.before_step(1, 3, "Pipe")
    window.push("inner")
    window.leave_loop()
    window.pop()
    window.pop()
    assert emitter.log == ["start Pipe-1_steps", "outer", "inner", "stop"]
    assert not window.is_on


def test_what_was_only_prepared_is_stopped() -> None:
    window = Window(emitter := Recording(), 1, all_stages=False)
    window.before_step(0, 3, "Pipe")
    assert window.is_loop_open
    window.leave_loop()
    window.leave_loop()
    assert emitter.log == ["prepare", "stop"]


def test_profiler_that_fails_is_told_once_and_left_alone(caplog: Any) -> None:
    window = Window(emitter := Failing(), 1, all_stages=False)
    loop(window, 3)
    loop(window, 3)
    assert window.failure == "RuntimeError: no profiler here"
    assert caplog.text.count("the run goes on without it") == 1
    assert not window.is_on
    assert emitter.log == ["prepare", "stop"]


# The whole of `profile(nvtx=True)` but for the last lines that call CUDA


@pytest.fixture
def emitted(monkeypatch: Any) -> Recording:
    emitter = Recording()
    monkeypatch.setattr(module, "NvtxEmitter", lambda: emitter)
    monkeypatch.setattr("sgl_diffusion_accel.profiling.profile_settings.refuse_without_cuda", lambda: None)
    return emitter


def test_ranges_of_nvtx_around_the_chosen_steps(emitted: Recording) -> None:
    family = present("wan")
    pipe = family.make()
    settings = ProfileSettings(steps=1, nvtx=True)
    assert settings.trace is False
    with Profile(pipe, settings) as prof:
        family.run(pipe, steps=4)
    blocks = [f"blocks.{index}" for index in range(6)]
    call = ["blocks", *blocks]
    assert emitted.log == [
        "prepare",
        "start WanPipeline-1_steps",
        "WanPipeline",
        "denoising_loop",
        emitted.log[4],
        "transformer (cond)",
        *call,
        "transformer (uncond)",
        *call,
        "scheduler",
        "stop",
    ]
    assert emitted.log[4].startswith("denoising_step_1_t")
    assert prof.report.last.traced_steps == (1,)
    assert prof.trace_path is None


@pytest.mark.parametrize("all_stages", [False, True])
def test_capture_of_nvtx_ends_after_an_error(emitted: Recording, all_stages: bool) -> None:
    family = present("wan")
    pipe = family.make()
    seen: list[int] = []

    def fail(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 4:
            raise RuntimeError("on purpose")

    pipe.transformer.blocks[2].register_forward_hook(fail)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        Profile(pipe, ProfileSettings(steps=4, all_stages=all_stages, nvtx=True)),
    ):
        family.run(pipe)
    assert emitted.log[-1] == "stop"
    assert emitted.log.count("stop") == 1
    assert emitted.open == []


def test_trace_and_nvtx_together(emitted: Recording, tmp_path: Path) -> None:
    family = present("wan")
    pipe = family.make()
    with Profile(pipe, ProfileSettings(steps=2, nvtx=True, trace=True, output_dir=tmp_path)) as prof:
        family.run(pipe, steps=4)
    assert prof.trace_path is not None
    assert len([name for name in emitted.log if name.startswith("denoising_step_")]) == 2


@pytest.mark.gpu
def test_nvtx_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    window = Window(NvtxEmitter(), 1, all_stages=False)
    window.push("outer")
    loop(window, 3)
    window.pop()
    assert window.failure is None
