"""Chrome traces: they load, and hold the ranges of steps, branches and blocks, nested and complete."""

from __future__ import annotations

import datetime
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from invariants import CACHES, families
from invariants.families import present
from sgl_diffusion_accel import ConfigError, profile
from sgl_diffusion_accel.profiling.recording.torch_trace import TorchEmitter, new_file
from zoo import Family

CACHED = CACHES["reuse"]


@dataclass(frozen=True)
class Range:
    name: str
    begin: float
    end: float

    def holds(self, other: Range) -> bool:
        return self.begin <= other.begin and other.end <= self.end


def ranges(path: Path) -> list[Range]:
    """The marked ranges of a trace, in the order of their beginning, the outer ones first."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    events = [each for each in trace["traceEvents"] if each.get("cat") == "user_annotation"]
    assert all(each["ph"] == "X" and each["dur"] >= 0 for each in events)
    found = [Range(each["name"], each["ts"], each["ts"] + each["dur"]) for each in events]
    return sorted(found, key=lambda each: (each.begin, -each.end))


def operators(path: Path) -> int:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    return sum(each.get("cat") == "cpu_op" for each in trace["traceEvents"])


def inside(outer: Range, all_of_them: list[Range]) -> list[Range]:
    return [each for each in all_of_them if each is not outer and outer.holds(each)]


def named(found: list[Range], pattern: str) -> list[Range]:
    return [each for each in found if re.fullmatch(pattern, each.name)]


def assert_nested(found: list[Range]) -> None:
    """Two ranges are apart, or one holds the other."""
    for index, each in enumerate(found):
        for other in found[index + 1 :]:
            assert each.end <= other.begin or each.holds(other), (each, other)


@families("wan", "qwen", "flux")
def test_steps_branches_and_blocks_are_nested_and_complete(family: Family, tmp_path: Path) -> None:
    cached = family.name in ("wan", "flux")
    pipe = family.make()
    if cached:
        CACHED(pipe)
    with profile(pipe, steps=2, output_dir=tmp_path) as prof:
        family.run(pipe, steps=4)
    assert prof.trace_path is not None
    found = ranges(prof.trace_path)
    assert_nested(found)
    (loop,) = named(found, "denoising_loop")
    steps = named(inside(loop, found), r"denoising_step_\d+_t[\d.]+")
    assert [int(each.name.split("_")[2]) for each in steps] == [1, 2] == list(prof.report.last.traced_steps)
    for step in steps:
        calls = named(inside(step, found), r"transformer \(.*\)")
        assert [each.name for each in calls] == [f"transformer ({branch})" for branch in family.branches]
        for call in calls:
            for name in family.block_lists:
                (blocks,) = named(inside(call, found), name)
                count = len(getattr(pipe.transformer, name))
                expected = [f"{name}.{index}" for index in range(count)]
                assert [each.name for each in named(inside(blocks, found), rf"{name}\.\d+")] == expected
            decided = named(inside(call, found), "cache: .*")
            assert len(decided) == cached
        assert len(named(inside(step, found), "scheduler")) == 1
    assert operators(prof.trace_path) > 100


def test_decisions_in_the_trace_are_those_of_the_cache(tmp_path: Path) -> None:
    family = present("wan")
    pipe = family.make()
    with CACHED(pipe) as patch, profile(pipe, steps=-1, output_dir=tmp_path) as prof:
        family.run(pipe, steps=4)
    assert prof.trace_path is not None
    told = [each.name for each in named(ranges(prof.trace_path), "cache: .*")]
    branches = patch.stats.runs[-1].branches
    records = [record for pair in zip(*(branches[name].records for name in branches), strict=True) for record in pair]
    assert told == [f"cache: {'compute' if each.computed else 'skip'} ({each.reason})" for each in records]


@pytest.mark.parametrize(
    ("steps", "run", "traced"),
    [(1, 4, (1,)), (2, 3, (1, 2)), (50, 3, (1, 2)), (3, 1, (0,)), (-1, 2, (0, 1))],
)
def test_which_steps_are_traced(steps: int, run: int, traced: tuple[int, ...], tmp_path: Path) -> None:
    family = present("wan")
    with profile(pipe := family.make(), steps=steps, output_dir=tmp_path) as prof:
        family.run(pipe, steps=run)
    assert prof.report.last.traced_steps == traced
    assert prof.trace_path is not None
    assert len(named(ranges(prof.trace_path), "denoising_step_.*")) == len(traced)
    fewer = [remark for remark in prof.report.last.remarks if remark.startswith("traced")]
    assert bool(fewer) == (steps > len(traced))
    assert f"{len(traced)}_steps" in prof.trace_path.name


def test_all_stages(tmp_path: Path) -> None:
    family = present("flux_img2img")
    with profile(pipe := family.make(), all_stages=True, output_dir=tmp_path) as prof:
        pipe(**family.call(pipe, steps=2, output_type="np"))
    assert prof.trace_path is not None
    found = ranges(prof.trace_path)
    assert_nested(found)
    outer, *rest = found
    assert outer.name == "FluxImg2ImgPipeline"
    assert inside(outer, found) == rest
    order = [each.name for each in found if each.name.startswith("stage_") or each.name == "denoising_loop"]
    assert order == [
        "stage_InputValidationStage",
        "stage_TextEncodingStage",
        "stage_ImageVAEEncodingStage",
        "denoising_loop",
        "stage_DecodingStage",
        "stage_PostprocessingStage",
    ]
    assert "full_stages" in prof.trace_path.name
    assert prof.report.last.traced_steps == (0, 1)
    assert prof.report.last.profiler_ms == 0  # it starts before the call, and stops behind it


def test_ranges_are_complete_after_an_error(tmp_path: Path) -> None:
    family = present("wan")
    pipe = family.make()
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("on purpose")

    pipe.transformer.blocks[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"), profile(pipe, steps=4, output_dir=tmp_path) as prof:
        family.run(pipe)
    assert prof.trace_path is not None
    found = ranges(prof.trace_path)
    assert_nested(found)
    assert len(named(found, "denoising_step_.*")) == 2
    assert len(named(found, r"blocks\.3")) == 3
    assert len(named(found, r"blocks\.4")) == 2


def test_compiled_blocks_are_marked(tmp_path: Path) -> None:
    torch._dynamo.reset()
    family = present("wan")
    pipe = family.make()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with profile(pipe, steps=1, output_dir=tmp_path) as prof:
        family.run(pipe, steps=2)
    assert prof.trace_path is not None
    assert len(named(ranges(prof.trace_path), r"blocks\.\d+")) == 2 * len(pipe.transformer.blocks)
    torch._dynamo.reset()


def test_shapes_stacks_and_memory_are_recorded_when_asked_for(tmp_path: Path) -> None:
    family = present("wan")
    pipe = family.make()
    options = {"record_shapes": True, "with_stack": True, "profile_memory": True}
    with profile(pipe, steps=1, output_dir=tmp_path, **options) as prof:
        family.run(pipe, steps=2)
    assert prof.trace_path is not None
    text = gzip.decompress(prof.trace_path.read_bytes()).decode()
    assert '"Input Dims"' in text
    assert '"python_function"' in text
    assert '"[memory]"' in text


def test_no_two_traces_share_a_name(tmp_path: Path) -> None:
    family = present("wan")
    pipe = family.make()
    paths = []
    for _ in range(2):
        with profile(pipe, steps=1, output_dir=tmp_path) as prof:
            family.run(pipe, steps=2)
        paths += prof.trace_paths
    assert len(set(paths)) == 2
    assert all(path.name.startswith("WanPipeline-1_steps-global-rank0-20") for path in paths)
    assert all(path.name.endswith(".trace.json.gz") for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    made = [new_file(tmp_path / "new", "trace", ".json").name for _ in range(3)]
    assert made == ["trace.json", "trace-2.json", "trace-3.json"]


def test_traces_of_the_same_moment_are_kept_apart(tmp_path: Path) -> None:
    emitter = TorchEmitter(record_shapes=False, with_stack=False, profile_memory=False)
    for _ in range(2):
        emitter.start("label")
        emitter.stop()
    moment = datetime.datetime(2026, 1, 1)
    emitter._finished = [(label, moment, profiler) for label, _, profiler in emitter._finished]
    names = [path.name for path in emitter.write(tmp_path)]
    assert names == [f"label-global-rank0-20260101-000000{more}.trace.json.gz" for more in ("", "-2")]


def test_no_trace_is_written_without_one(tmp_path: Path) -> None:
    family = present("wan")
    with profile(pipe := family.make(), trace=False, output_dir=tmp_path) as prof:
        family.run(pipe, steps=2)
    assert prof.trace_path is None
    assert list(tmp_path.iterdir()) == []
    assert prof.report.last.profiler_ms == 0


def test_another_profiler_that_is_running_is_told_and_does_not_end_the_run(tmp_path: Path) -> None:
    family = present("wan")
    pipe = family.make()
    expected = family.run(pipe, steps=3)
    with torch.profiler.profile(), pytest.raises(ConfigError, match="one at a time"):
        profile(pipe, output_dir=tmp_path).__enter__()
    with profile(pipe, steps=1, output_dir=tmp_path) as prof, torch.profiler.profile() as other:
        assert torch.equal(family.run(pipe, steps=3), expected)
    assert "aten::linear" in {each.key for each in other.key_averages()}
    assert prof.trace_path is None
    assert any("the profiler failed" in remark for remark in prof.report.remarks)
    assert len(prof.report.steps) == 3
