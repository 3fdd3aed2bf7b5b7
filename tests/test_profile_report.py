"""Reports: the parts add up, tables say what is in them, the JSON has SGLang's fields, the timeline is drawn."""

from __future__ import annotations

import builtins
import importlib.util
import io
import json
import math
import re
import time
from dataclasses import FrozenInstanceError
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.overhead import make_pipeline, wan_call
from invariants import CACHES
from invariants.families import present
from sgl_diffusion_accel import ConfigError, MissingPackageError, ProfileReport, profile
from sgl_diffusion_accel.profiling.recording import stages
from sgl_diffusion_accel.profiling.recording.memory import MemoryCheckpoint
from sgl_diffusion_accel.profiling.results.perf_json import perf_fields, read_perf
from sgl_diffusion_accel.profiling.results.timing_tables import decisions, spans, text
from sgl_diffusion_accel.profiling.results.timings import BranchTiming, CallReport, StageTiming, StepTiming


def measured(name: str = "wan", cache: str | None = None, **kw: Any) -> Any:
    family = present(name)
    pipe = family.make()
    if cache is not None:
        CACHES[cache](pipe)
    with profile(pipe, trace=False) as prof:
        family.run(pipe, **kw)
    return prof


def step(index: int, ms: float, computed: bool | None = None, traced: bool = False) -> StepTiming:
    branches = (BranchTiming("cond", "transformer", 0.0, ms * 0.8, computed, "because", math.inf),)
    return StepTiming(index, 1000.0 - index, 0.0, ms, branches, ms * 0.1, 0.0, traced)


def report(steps: tuple[StepTiming, ...], **more: Any) -> ProfileReport:
    parts = (StageTiming("text encoding", 10.0), StageTiming("denoising", sum(each.duration_ms for each in steps)))
    total = sum(each.duration_ms for each in parts) + 5
    memory = (MemoryCheckpoint("mem_analysis", 1.0, 2.0, 3.0, 4.0, 5.004),)
    return ProfileReport(
        (CallReport("Pipe", "cuda:0", "events of cuda:0", total, parts, steps, memory=memory, **more),)
    )


MIXED = report((step(0, 40, True), step(1, 60, True, traced=True), step(2, 8, False), step(3, 12, False)))


# The parts and the whole


def test_parts_add_up_to_the_wall_time_at_real_width() -> None:
    """The report's total is what the caller sees, and what belongs to no part is small."""
    torch.set_num_threads(1)
    pipe = make_pipeline(1)
    given = wan_call(3)
    pipe(**given)
    with profile(pipe, trace=False) as prof:
        begin = time.perf_counter()
        pipe(**given)
        wall = (time.perf_counter() - begin) * 1000
    call = prof.report.last
    parts = sum(stage.duration_ms for stage in call.stages)
    assert parts + call.other_ms == pytest.approx(call.total_ms)
    assert call.total_ms == pytest.approx(wall, rel=0.05)
    assert parts == pytest.approx(wall, rel=0.05)
    (denoising,) = [stage for stage in call.stages if stage.name == "denoising"]
    assert sum(call.denoise_steps_ms) == pytest.approx(denoising.duration_ms, rel=0.05)
    for each in call.steps:
        assert each.transformer_ms + each.scheduler_ms == pytest.approx(each.duration_ms, rel=0.1)


@pytest.mark.parametrize("name", ["wan", "flux_controlnet", "flux_img2img", "wan22", "ltx"])
def test_no_part_is_negative_or_counted_twice(name: str) -> None:
    call = measured(name).report.last
    assert call.other_ms >= 0
    assert all(stage.duration_ms >= 0 for stage in call.stages)
    for each in call.steps:
        assert each.other_ms >= 0
        assert each.scheduler_ms > 0
    begins = [each.begin_ms for each in call.steps]
    assert begins == sorted(begins)
    assert all(
        first.begin_ms + first.duration_ms <= second.begin_ms + 1e-6
        for first, second in zip(call.steps, call.steps[1:], strict=False)
    )


def test_timesteps_are_those_of_the_scheduler() -> None:
    family = present("wan")
    pipe = family.make()
    with profile(pipe, trace=False) as prof:
        family.run(pipe)
    assert [each.timestep for each in prof.report.steps] == pytest.approx(pipe.scheduler.timesteps.tolist())


def test_reports_are_frozen_data() -> None:
    with pytest.raises(FrozenInstanceError):
        MIXED.calls = ()  # type: ignore[misc]
    assert MIXED.denoise_steps_ms == (40, 60, 8, 12)
    assert MIXED.total_ms == 135
    assert MIXED.last.other_ms == pytest.approx(5)
    assert MIXED.last.traced_steps == (1,)
    assert MIXED.last.skipped_steps == (2, 3)
    assert MIXED.last.step_ms == 12  # the median of those that were not traced
    assert MIXED.steps[0].other_ms == pytest.approx(4)
    assert report((step(0, 7, traced=True),)).last.step_ms == 7
    assert report(()).last.step_ms == 0


def test_step_is_computed_if_any_branch_is() -> None:
    branch = BranchTiming("cond", "transformer", 0, 1, True)
    other = BranchTiming("uncond", "transformer", 0, 1, False, "below")
    assert StepTiming(0, 0, 0, 2, (branch, other)).computed
    assert StepTiming(0, 0, 0, 2, (other,)).computed is False
    assert StepTiming(0, 0, 0, 2, (BranchTiming("cond", "transformer", 0, 1),)).computed is None
    assert decisions(StepTiming(0, 0, 0, 2, (other, other))) == "· below"
    assert decisions(StepTiming(0, 0, 0, 2, (branch, other))) == "cond █ None, uncond · below"


def test_unknown_call_is_refused() -> None:
    with pytest.raises(ConfigError, match="measured: 1 calls"):
        MIXED.plot("never.png", call=3)
    assert not Path("never.png").exists()


# Tables


@pytest.mark.parametrize("has_rich", [True, False])
def test_table_says_everything(has_rich: bool, monkeypatch: Any) -> None:
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    shown = str(MIXED)
    for expected in (
        "Pipe: 135.0 ms on cuda:0 (events of cuda:0)",
        "text encoding",
        "other",
        "skipped by the cache",
        "█ because",
        "· because",
        "traced, and so slower than the others: steps 1",
        "mem_analysis",
    ):
        assert expected in shown
    assert ("─" in shown) == has_rich
    assert max(map(len, shown.splitlines())) <= 120


def test_table_of_a_long_run_ends_with_its_first_steps() -> None:
    shown = text(report(tuple(step(index, 5) for index in range(80))))
    assert "the first 60 steps" in shown
    assert re.search(r"^ ?59 ", shown, re.MULTILINE)
    assert not re.search(r"^ ?60 ", shown, re.MULTILINE)


def test_table_without_a_cache_has_no_column_for_it() -> None:
    shown = str(measured(steps=2).report)
    assert "cache" not in shown
    assert "all" in shown


def test_rich_prints_it_and_notebooks_show_it() -> None:
    rich = pytest.importorskip("rich.console")
    sheet = io.StringIO()
    rich.Console(file=sheet, width=100).print(MIXED)
    assert "skipped by the cache" in sheet.getvalue()
    shown = MIXED._repr_html_()
    assert shown.count("<table") == 4
    assert "because" in shown


def test_narrow_terminal_cuts_no_number() -> None:
    rich = pytest.importorskip("rich.console")
    branches = tuple(BranchTiming(name, "transformer", 0.0, 600.0, True, "because") for name in ("cond", "uncond"))
    long = StepTiming(0, 999.123, 0.0, 1234.5, branches, 10.0)
    sheet = io.StringIO()
    rich.Console(file=sheet, width=60).print(report((long,)))
    lines = [line.split() for line in sheet.getvalue().splitlines()]
    assert ["0", "999.123", "1,234.5", "600.0", "600.0", "10.00", "24.50"] in [line[:7] for line in lines]
    assert ["computed", "1", "1,234.5", "1,234.5", "1,234.5"] in lines
    assert max(map(len, sheet.getvalue().splitlines())) <= 60


def test_text_in_a_notebook_is_text(monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("rich")
    shell = type("ZMQInteractiveShell", (), {})
    expected = str(MIXED)
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    assert str(MIXED) == expected != ""
    assert capsys.readouterr().out == ""


def test_text_of_pipelines_is_escaped_in_html() -> None:
    remarked = report((step(0, 1),), remarks=("<b>bold</b> [red]",))
    assert "<b>bold</b>" not in remarked._repr_html_()
    assert "[red]" in str(remarked)


def test_spans() -> None:
    assert spans([]) == ""
    assert spans([4]) == "4"
    assert spans([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"


# SGLang's JSON

FIELDS = {
    "timestamp": str,
    "request_id": str,
    "commit_hash": str,
    "tag": str,
    "total_duration_ms": float,
    "steps": list,
    "denoise_steps_ms": list,
    "memory_checkpoints": dict,
    "meta": dict,
}
COUNTS = {"allocated_mb", "reserved_mb", "peak_allocated_mb", "peak_reserved_mb", "peak_host_anon_mb"}


def test_every_field_of_sglang_is_written(tmp_path: Path) -> None:
    prof = measured("flux_img2img", "reuse")
    path = prof.save_perf(tmp_path / "new" / "perf.json", tag="mine")
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {name: type(value) for name, value in data.items()} == FIELDS
    assert datetime.fromisoformat(data["timestamp"]).tzinfo is not None
    assert data["tag"] == "mine"
    assert all(set(each) == {"name", "duration_ms"} for each in data["steps"])
    assert sum(each["duration_ms"] for each in data["steps"]) == pytest.approx(data["total_duration_ms"])
    assert {"TextEncodingStage", "ImageVAEEncodingStage", "DenoisingStage"} <= {each["name"] for each in data["steps"]}
    assert [each["step"] for each in data["denoise_steps_ms"]] == list(range(6))
    assert [each["duration_ms"] for each in data["denoise_steps_ms"]] == list(prof.report.denoise_steps_ms)
    assert all(set(counts) == COUNTS for counts in data["memory_checkpoints"].values())
    assert {"before_forward", "after_DenoisingStage", "mem_analysis"} <= set(data["memory_checkpoints"])
    assert data["meta"]["pipeline"] == "FluxImg2ImgPipeline"
    assert data["meta"]["versions"]["torch"] == torch.__version__
    assert len(data["meta"]["denoise_steps"]) == 6
    assert data["meta"]["denoise_steps"][0]["branches"][0]["reason"]


def test_memory_is_rounded_as_sglang_does() -> None:
    fields = perf_fields(MIXED, MIXED.last, "tag")
    assert fields["memory_checkpoints"]["mem_analysis"]["peak_host_anon_mb"] == 5.0


def test_what_is_written_is_read(tmp_path: Path) -> None:
    prof = measured()
    found = read_perf(prof.save_perf(str(tmp_path / "perf.json")))
    assert found.total_ms == prof.report.total_ms
    assert found.denoise_steps_ms == prof.report.denoise_steps_ms
    assert found.stages["DenoisingStage"] == prof.report.stages[1].duration_ms
    assert found.peak("peak_host_anon_mb")
    assert found.peak("unknown") is None
    assert found.about["tag"] == "sgl_diffusion_accel"


def test_commit_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SGLANG_GIT_COMMIT", "abc")
    assert perf_fields(MIXED, MIXED.last, "")["commit_hash"] == "abc"
    monkeypatch.delenv("SGLANG_GIT_COMMIT")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert perf_fields(MIXED, MIXED.last, "")["commit_hash"] == "N/A"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert perf_fields(MIXED, MIXED.last, "")["commit_hash"] == "N/A"


def test_nothing_is_saved_without_a_call(tmp_path: Path) -> None:
    with profile(present("wan").make(), trace=False) as prof:
        pass
    with pytest.raises(ConfigError, match="nothing has been measured"):
        prof.save_perf(tmp_path / "perf.json")
    assert list(tmp_path.iterdir()) == []


def test_names_of_stages_are_sglangs() -> None:
    assert stages.sglang_name("decoding") == "DecodingStage"
    assert stages.sglang_name("audio vocoder") == "AudioVocoderStage"


# The timeline


@pytest.mark.parametrize("name", ["wan", "flux_controlnet", "wan22"])
def test_timeline_is_a_picture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = measured(name, "reuse").report.plot(tmp_path / "new" / "timeline.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [0, 1, 120])
def test_timeline_of_few_and_of_many_steps(steps: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = report(tuple(step(index, 5, index % 3 == 0) for index in range(steps)))
    assert made.plot(tmp_path / "timeline.png").exists()


def test_timeline_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"pip install .*\[plots\]"):
        MIXED.plot(tmp_path / "timeline.png")
