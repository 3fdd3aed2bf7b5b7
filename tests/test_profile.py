"""`profile` around pipeline calls: outputs stay, nothing stays behind, and what was measured is there."""

from __future__ import annotations

import copy
import doctest
import gc
import pickle
import threading
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import sgl_diffusion_accel
from invariants import CACHES, Interrupted, Snapshot, assert_same, failing_at, families
from invariants.families import present
from sgl_diffusion_accel import (
    ConfigError,
    ConfigTypeError,
    Profile,
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    calibrate,
    profile,
    set_attention_backend,
)
from sgl_diffusion_accel.profiling.recording.torch_trace import is_recording
from sgl_diffusion_accel.slots import slot_of
from zoo import FAMILIES, Family

CACHED = CACHES["reuse"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "traces"


def ready(name: str | Family) -> tuple[Family, Any]:
    """A pipeline that has run once, so that what diffusers makes on first use is there."""
    family = present(name) if isinstance(name, str) else name
    pipe = family.make()
    family.run(pipe, steps=2)
    return family, pipe


def assert_free(pipe: Any) -> None:
    for part in (pipe, *pipe.components.values()):
        if part is not None and hasattr(part, "__dict__"):
            assert slot_of(part) is None
            assert type(part).__mro__[1].__name__ != type(part).__name__
    assert "step" not in vars(pipe.scheduler)


# Outputs, and what is left behind


@families("wan", "wan22", "flux", "sd3", "zimage", "kandinsky5", "ideogram4", matrix=FAMILIES)
def test_output_is_bitwise_the_same_and_nothing_stays(family: Family) -> None:
    family, pipe = ready(family)
    expected, before = family.run(pipe), Snapshot(pipe)
    with profile(pipe, trace=False) as prof:
        output = family.run(pipe)
    assert torch.equal(output, expected)
    assert_same(before, pipe)
    assert_free(pipe)
    assert prof.report.last.is_complete
    assert len(prof.report.steps) == 6
    assert len(prof.report.last.branches) == len(family.branches)
    assert all(len(step.branches) == len(family.branches) for step in prof.report.steps)


@pytest.mark.parametrize(
    ("name", "all_stages"),
    [
        ("wan", False),
        ("wan22", True),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in (("qwen", True), ("flux", False))),
    ],
)
def test_trace_changes_no_bit_and_leaves_nothing(name: str, all_stages: bool, folder: Path) -> None:
    family, pipe = ready(name)
    expected, before = family.run(pipe, steps=3), Snapshot(pipe)
    with profile(pipe, steps=1, all_stages=all_stages, output_dir=folder) as prof:
        output = family.run(pipe, steps=3)
    assert torch.equal(output, expected)
    assert_same(before, pipe)
    assert_free(pipe)
    assert prof.trace_path is not None
    assert prof.trace_path.exists()


@pytest.mark.parametrize(
    ("name", "cache", "order"),
    [("wan", cache, "cache first") for cache in CACHES] + [("flux", "reuse", "profile first")],
)
def test_goes_with_a_cache_and_tells_what_it_did(name: str, cache: str, order: str, folder: Path) -> None:
    family, pipe = ready(name)
    with CACHES[cache](pipe):
        expected = family.run(pipe)
    if order == "cache first":
        with CACHES[cache](pipe) as patch, profile(pipe, trace=False) as prof:
            output = family.run(pipe)
    else:
        with profile(pipe, steps=1, output_dir=folder) as prof, CACHES[cache](pipe) as patch:
            output = family.run(pipe)
    assert torch.equal(output, expected)
    for name, branch in patch.stats.runs[-1].branches.items():
        seen = [each for step in prof.report.steps for each in step.branches if each.name == name]
        assert tuple(each.computed for each in seen) == branch.computed
        assert tuple(each.reason for each in seen) == branch.reasons
        assert tuple(each.change for each in seen) == branch.changes
    assert False in [step.computed for step in prof.report.steps] or cache.startswith("teacache")
    assert_free(pipe)


def adaptive(pipe: Any) -> Any:
    return apply_adaptive_cache(pipe, tolerance=0.5)


def planned(pipe: Any) -> Any:
    donor = present("wan").make()
    plan = calibrate(donor, [present("wan").call(donor, steps=12)])
    return apply_cache_plan(pipe, plan, speedup=2.0)


@pytest.mark.parametrize(
    ("cache", "whole", "order"),
    [
        (adaptive, True, "cache first"),
        (adaptive, True, "profile first"),
        (adaptive, False, "profile first"),
        (planned, True, "profile first"),
        (planned, False, "cache first"),
    ],
)
def test_step_at_which_a_cache_answers_for_the_transformer_is_listed(cache: Any, whole: bool, order: str) -> None:
    family, pipe = ready("wan")
    profiled = pipe if whole else pipe.transformer
    with ExitStack() as stack:
        if order == "cache first":
            patch = stack.enter_context(cache(pipe))
        prof = stack.enter_context(profile(profiled, trace=False))
        if order == "profile first":
            patch = stack.enter_context(cache(pipe))
        family.run(pipe, steps=12)
    assert prof.report.last.is_complete
    for name, branch in patch.stats.runs[-1].branches.items():
        seen = [each for step in prof.report.steps for each in step.branches if each.name == name]
        assert tuple(each.computed for each in seen) == branch.computed
        assert tuple(each.reason for each in seen) == branch.reasons
        assert False in branch.computed
    assert_free(pipe)


def test_cache_applied_in_mid_run_is_watched_from_there_on() -> None:
    family, pipe = ready("wan")

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        del timestep
        if step == 1:
            adaptive(pipe)
        return tensors

    with profile(pipe, trace=False) as prof, torch.no_grad():
        pipe(**family.call(pipe, steps=12), callback_on_step_end=callback)
    assert [step.index for step in prof.report.steps] == list(range(12))
    assert prof.report.steps[0].computed is None
    assert False in [step.computed for step in prof.report.steps]


def test_goes_with_an_attention_backend() -> None:
    family, pipe = ready("wan")
    with set_attention_backend(pipe, "math"):
        expected = family.run(pipe)
    with profile(pipe, trace=False), set_attention_backend(pipe, "math") as patch:
        assert torch.equal(family.run(pipe), expected)
    assert sum(patch.calls["transformer"].values())
    assert_free(pipe)


@pytest.mark.parametrize(
    ("place", "error", "all_stages"),
    [
        ("block", Interrupted, False),
        ("block", KeyboardInterrupt, True),
        ("scheduler", KeyboardInterrupt, False),
        ("callback", Interrupted, True),
    ],
)
def test_error_in_mid_run_leaves_nothing_and_keeps_what_was_measured(
    place: str, error: type[BaseException], all_stages: bool, folder: Path
) -> None:
    family, pipe = ready("wan")
    expected, before = family.run(pipe), Snapshot(pipe)
    with profile(pipe, steps=2, all_stages=all_stages, output_dir=folder) as prof:
        failing_at(family, pipe, place, error)
    call = prof.report.last
    assert not call.is_complete
    assert call.error == f"{error.__name__}: on purpose"
    assert len(call.steps) == (2 if place == "block" else 3)  # there the calls are counted, two a step
    assert any("incomplete" in remark for remark in call.remarks)
    assert "INCOMPLETE" in str(prof.report)
    assert prof.trace_path is not None
    assert prof.trace_path.exists()
    pipe._current_timestep = None  # where diffusers leaves the one at which its run ended
    assert_same(before, pipe)
    assert_free(pipe)
    assert not torch.autograd.profiler._is_profiler_enabled
    assert torch.equal(family.run(pipe), expected)


@pytest.mark.parametrize("at", [0, 2])
def test_error_before_a_trace_begins_leaves_no_profiler_on(at: int, folder: Path) -> None:
    """In the warm-up step the profiler has been set up and is not recording yet."""
    family, pipe = ready("wan")
    with profile(pipe, steps=2, output_dir=folder) as prof:
        failing_at(family, pipe, "block", Interrupted, at=at)
    assert not torch.autograd.profiler._is_profiler_enabled
    assert (prof.trace_path is None) == (at == 0)
    with profile(pipe, steps=2, output_dir=folder) as again:
        family.run(pipe)
    assert again.trace_path is not None


def test_error_leaves_the_block_as_it_was_raised(folder: Path) -> None:
    family, pipe = ready("wan")
    with pytest.raises(ZeroDivisionError), profile(pipe, output_dir=folder) as prof:
        family.run(pipe)
        raise ZeroDivisionError
    assert prof.report.last.is_complete
    assert_free(pipe)


def test_trace_that_cannot_be_written_does_not_hide_another_error(folder: Path, caplog: Any) -> None:
    family, pipe = ready("wan")
    with pytest.raises(ZeroDivisionError), profile(pipe, steps=1, output_dir=folder):
        family.run(pipe, steps=2)
        folder.write_text("a file where the folder should be")
        raise ZeroDivisionError
    assert "could not be written" in caplog.text
    assert_free(pipe)


def test_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    family = present("wan")
    pipe = family.make()
    (example,) = doctest.DocTestFinder(recurse=False).find(
        profile, globs={"profile": profile, "pipe": pipe, "call": family.call(pipe)}
    )
    source = "".join(each.source for each in example.examples)
    exec(source, example.globs)
    assert "WanPipeline" in capsys.readouterr().out
    assert (tmp_path / "perf.json").exists()
    assert len(list((tmp_path / "logs").iterdir())) == 1


# Runs of all kinds


def test_several_calls_in_one_block(folder: Path) -> None:
    family, pipe = ready("qwen")
    with profile(pipe, steps=1, output_dir=folder) as prof:
        family.run(pipe, steps=3)
        assert len(prof.report.calls) == 1  # can be read in between
        family.run(pipe, steps=4)
        family.run(pipe, steps=2, guidance=1.0)
    assert [len(call.steps) for call in prof.report.calls] == [3, 4, 2]
    assert [call.branches for call in prof.report.calls] == [("cond", "uncond"), ("cond", "uncond"), ("cond",)]
    assert len(set(prof.trace_paths)) == 3
    assert all(call.is_whole and call.is_complete for call in prof.report.calls)


def test_two_experts_are_told_apart() -> None:
    family, pipe = ready("wan22")
    with profile(pipe, trace=False) as prof:
        family.run(pipe)
    used = [{branch.component for branch in step.branches} for step in prof.report.steps]
    assert used == [{"transformer"}] * 3 + [{"transformer_2"}] * 3


def test_batched_guidance_is_one_branch() -> None:
    family, pipe = ready("ltx")
    with profile(pipe, trace=False) as prof:
        family.run(pipe)
    assert prof.report.last.branches == ("cond_uncond",)


def test_pipeline_that_shares_the_transformer_is_seen_by_its_loop() -> None:
    family, pipe = ready("wan")
    other = family.make()
    other.transformer = pipe.transformer
    with profile(pipe, trace=False) as prof:
        family.run(other, steps=4)
        family.run(pipe, steps=3)
    loop, whole = prof.report.calls
    assert (loop.is_whole, len(loop.steps), loop.is_complete) == (False, 4, True)
    assert (whole.is_whole, len(whole.steps)) == (True, 3)
    assert any("only the denoising loop" in remark for remark in loop.remarks)
    assert_free(other)


def test_transformer_by_itself() -> None:
    family, pipe = ready("wan")
    with profile(pipe.transformer, trace=False) as prof:
        family.run(pipe)
    assert len(prof.report.steps) == 6
    assert prof.report.last.stages[0].name == "denoising"
    assert_free(pipe)


def test_call_outside_of_any_loop_is_left_alone() -> None:
    family, pipe = ready("wan")
    with profile(pipe, trace=False) as prof, torch.no_grad():
        pipe.transformer(**family.bare(pipe))
    assert prof.report.calls == ()
    with pytest.raises(ConfigError, match="nothing has been measured"):
        prof.report.total_ms  # noqa: B018
    assert "nothing has been measured" in str(prof.report)


def test_callback_that_calls_the_transformer_is_no_branch() -> None:
    family, pipe = ready("wan")
    bare = family.bare(pipe)

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipe.transformer(**bare)
        return tensors

    with profile(pipe, trace=False) as prof:
        family.run(pipe, steps=3, callback_on_step_end=callback)
    assert all(len(step.branches) == 2 for step in prof.report.steps)
    assert prof.report.steps[0].other_ms > prof.report.steps[0].branches[0].duration_ms / 10


def test_interrupted_run_ends_its_loop() -> None:
    family, pipe = ready("wan")

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipe._interrupt = step == 2
        return tensors

    with profile(pipe, trace=False) as prof:
        family.run(pipe, callback_on_step_end=stop)
    assert len(prof.report.steps) == 3
    assert not prof.report.last.is_complete
    assert any("3 of 6" in remark for remark in prof.report.last.remarks)


def test_stages_of_a_pipeline_with_a_vae() -> None:
    family, pipe = ready("flux_img2img")
    with profile(pipe, trace=False) as prof:
        pipe(**family.call(pipe, output_type="np"))
    names = [stage.name for stage in prof.report.stages]
    assert names == ["preprocessing", "text encoding", "VAE encoding", "denoising", "decoding", "postprocessing"]
    assert_free(pipe)


def test_decoding_in_a_callback_belongs_to_its_step() -> None:
    family, pipe = ready("flux_img2img")

    def preview(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipe.vae.decode(torch.zeros(1, pipe.vae.config.latent_channels, 8, 8))
        return tensors

    with profile(pipe, trace=False) as prof:
        family.run(pipe, steps=4, callback_on_step_end=preview)
    (decoding,) = [stage for stage in prof.report.stages if stage.name == "decoding"]
    assert len(decoding.spans) == 1  # behind the last step, where the loop has ended
    assert len(prof.report.steps) == 4


def test_controlnet_is_a_part_of_its_step() -> None:
    family, pipe = ready("flux_controlnet")
    with profile(pipe, trace=False) as prof:
        family.run(pipe)
    assert all(step.control_ms > 0 for step in prof.report.steps)
    assert all(step.other_ms >= 0 for step in prof.report.steps)


def test_scheduler_that_is_exchanged_or_copied_within_the_block() -> None:
    family, pipe = ready("wan")
    with profile(pipe, trace=False) as prof:
        family.run(pipe, steps=3)
        first = pipe.scheduler
        copied = copy.deepcopy(first)
        assert slot_of(copied) is None
        assert type(copied).__mro__[0] is type(copied)
        assert pickle.loads(pickle.dumps(first)).config == first.config
        pipe.scheduler = copied
        family.run(pipe, steps=3)
    assert all(step.scheduler_ms > 0 for call in prof.report.calls for step in call.steps)
    assert slot_of(first) is None
    assert slot_of(copied) is None


def test_attributes_that_were_there_before_are_put_back() -> None:
    family, pipe = ready("wan")
    original, seen = pipe.scheduler.step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    pipe.scheduler.step = step
    with profile(pipe, trace=False) as prof:
        family.run(pipe, steps=3)
    assert pipe.scheduler.step is step
    assert len(seen) == 3
    assert all(each.scheduler_ms > 0 for each in prof.report.steps)


def test_components_exchanged_within_the_block_are_seen() -> None:
    family, pipe = ready("wan")
    first = pipe.transformer
    with profile(pipe, trace=False) as prof:
        pipe.transformer = family.make(seed=3).transformer
        family.run(pipe, steps=2)
    assert len(prof.report.steps) == 2
    assert slot_of(first) is None
    assert_free(pipe)


def test_runs_in_two_threads_are_kept_apart() -> None:
    family, pipes = present("wan"), [ready("wan")[1] for _ in range(2)]
    profiles: list[Profile] = []

    def run(pipe: Any, steps: int) -> None:
        with profile(pipe, trace=False) as prof:
            family.run(pipe, steps=steps)
        profiles.append(prof)

    threads = [threading.Thread(target=run, args=(pipe, steps)) for pipe, steps in zip(pipes, (3, 5), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(prof.report.steps) for prof in profiles) == [3, 5]


def test_threads_that_share_a_traced_transformer_do_not_end_each_other(folder: Path) -> None:
    family, pipe = ready("wan")
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    expected = family.run(pipe)
    outputs: list[torch.Tensor] = []
    at_once = threading.Barrier(2)

    def run(pipe: Any) -> None:
        at_once.wait(60)
        outputs.extend(family.run(pipe) for _ in range(3))

    with profile(pipe, steps=2, output_dir=folder) as prof:
        threads = [threading.Thread(target=run, args=(each,)) for each in (pipe, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outputs) == 6
    assert all(torch.equal(each, expected) for each in outputs)
    assert [(len(call.steps), call.is_complete) for call in prof.report.calls] == [(6, True)] * 6
    assert sum(call.is_whole for call in prof.report.calls) == 3
    assert prof.trace_paths
    assert not is_recording()
    assert_free(pipe)


def test_profile_of_a_pipeline_keeps_no_model_alive() -> None:
    family, pipe = ready("wan")
    with profile(pipe, trace=False) as prof:
        family.run(pipe, steps=2)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None
    assert len(prof.report.steps) == 2


# torch.compile


class Counting:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_blocks(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)


def compile_whole(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile(backend=backend)


def wrap(pipe: Any, backend: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("compiled", "trace"),
    [
        (compile_blocks, True),
        (wrap, False),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in ((compile_blocks, False), (compile_whole, True))),
    ],
)
def test_nothing_is_compiled_once_more(compiled: Any, trace: bool, folder: Path) -> None:
    family, pipe = ready("wan")
    backend = Counting()
    compiled(pipe, backend)
    expected, graphs = family.run(pipe), backend.graphs
    assert graphs
    with profile(pipe, steps=2, trace=trace, output_dir=folder) as prof:
        assert torch.equal(family.run(pipe), expected)
    assert backend.graphs == graphs
    assert [step.branches[0].name for step in prof.report.steps] == ["cond"] * 6
    assert torch.equal(family.run(pipe), expected)
    assert backend.graphs == graphs
    assert_free(pipe)
    if trace and compiled is not compile_blocks:
        assert any("compiled as a whole" in remark for remark in prof.report.remarks)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_cached() -> None:
    family, pipe = ready("wan")
    compile_blocks(pipe, Counting())
    with CACHED(pipe):
        expected = family.run(pipe)
    with CACHED(pipe), profile(pipe, trace=False) as prof:
        assert torch.equal(family.run(pipe), expected)
    assert prof.report.last.skipped_steps


def test_offload_before_and_within() -> None:
    accelerate = pytest.importorskip("accelerate")
    family, pipe = ready("wan")
    expected = family.run(pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with profile(pipe, trace=False) as prof:
        assert torch.equal(family.run(pipe), expected)
    assert len(prof.report.steps) == 6
    family, pipe = ready("wan")
    with profile(pipe, trace=False) as prof:
        accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        assert torch.equal(family.run(pipe), expected)
    assert len(prof.report.steps) == 6
    assert torch.equal(family.run(pipe), expected)


# What is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ConfigError, "steps=0; allowed: a whole number from 1, or -1"),
        ({"steps": -2}, ConfigError, "steps=-2"),
        ({"steps": "5"}, ConfigTypeError, "steps='5' is a str"),
        ({"steps": 2.0}, ConfigTypeError, "float"),
        ({"steps": True}, ConfigTypeError, "bool"),
        ({"all_stages": 1}, ConfigTypeError, "all_stages=1"),
        ({"trace": "yes"}, ConfigTypeError, "trace='yes'"),
        ({"output_dir": 3}, ConfigTypeError, "output_dir=3 is a int"),
        ({"trace": False, "with_stack": True}, ConfigError, "with_stack=True"),
    ],
)
def test_wrong_settings_are_refused_at_the_call(settings: Any, error: Any, message: str) -> None:
    pipe = present("wan").make()
    with pytest.raises(error, match=message):
        profile(pipe, **settings)
    assert_free(pipe)


def test_folder_that_is_a_file_is_refused_at_the_call(tmp_path: Path) -> None:
    pipe, file = present("wan").make(), tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        profile(pipe, output_dir=file)
    with pytest.raises(ConfigError, match="is a file"):
        profile(pipe, output_dir=file / "below")
    profile(pipe, output_dir=file, trace=False)  # nothing is written


def test_folder_that_cannot_be_written_is_refused_at_the_call(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="not writable"):
        profile(present("wan").make(), output_dir=tmp_path / "new")


def test_folder_comes_from_the_environment_at_the_call(tmp_path: Path, monkeypatch: Any) -> None:
    family, pipe = ready("wan")
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path / "second"))
    assert profile(pipe).settings.folder == tmp_path / "second"
    monkeypatch.setenv("SGLANG_DIFFUSION_TORCH_PROFILER_DIR", str(tmp_path / "first"))
    with profile(pipe, steps=1) as prof:
        family.run(pipe, steps=2)
    assert prof.trace_path is not None
    assert prof.trace_path.parent == tmp_path / "first"
    assert profile(pipe, output_dir=tmp_path / "named").settings.folder == tmp_path / "named"
    monkeypatch.delenv("SGLANG_DIFFUSION_TORCH_PROFILER_DIR")
    monkeypatch.delenv("SGLANG_TORCH_PROFILER_DIR")
    assert profile(pipe).settings.folder == Path("logs")
    assert not (tmp_path / "second").exists()  # no folder is made before something is written


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(ConfigTypeError, match="str"):
        profile("pipe")
    pipe = present("wan").make()
    pipe.transformer = None
    with pytest.raises(UnsupportedModelError):
        profile(pipe)


def test_pipeline_is_profiled_once_at_a_time() -> None:
    family, pipe = ready("wan")
    with profile(pipe, trace=False) as outer:
        with pytest.raises(ConfigError, match="is being profiled already"), profile(pipe, trace=False):
            pass
        family.run(pipe, steps=2)
    assert len(outer.report.steps) == 2
    assert_free(pipe)


def test_profile_is_entered_once() -> None:
    family, pipe = ready("wan")
    prof = profile(pipe, trace=False)
    with prof:
        with pytest.raises(ConfigError, match="entered once"):
            prof.__enter__()
        family.run(pipe, steps=2)
    with pytest.raises(ConfigError, match="entered once"), prof:
        pass
    assert_free(pipe)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_nvtx_without_cuda_is_refused_at_the_call() -> None:
    with pytest.raises(ConfigError, match="nvtx=True needs a CUDA device"):
        profile(present("wan").make(), nvtx=True)


def test_two_pipelines_that_share_parts_are_profiled_at_the_same_time() -> None:
    family, pipe = ready("wan")
    other = family.make()
    other.scheduler, other.transformer = pipe.scheduler, pipe.transformer
    with profile(pipe, trace=False) as first:
        with profile(other, trace=False) as second:
            family.run(other, steps=3)
        family.run(pipe, steps=2)
    assert [len(call.steps) for call in first.report.calls] == [3, 2]
    assert [len(call.steps) for call in second.report.calls] == [3]
    assert_free(pipe)
    assert_free(other)


def test_removing_patches_within_the_block_leaves_the_profile() -> None:
    from sgl_diffusion_accel import remove

    family, pipe = ready("wan")
    with profile(pipe, trace=False) as prof:
        apply_cache_dit(pipe)
        remove(pipe)
        family.run(pipe, steps=2)
    assert len(prof.report.steps) == 2


@pytest.mark.gpu
@families("wan", "flux")
def test_no_wait_on_a_gpu_and_times_of_the_device(family: Family) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    pipe = family.make().to("cuda")
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in family.call(pipe).items()}
    expected = family.run(pipe, **given)
    with profile(pipe, trace=False) as prof:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                output = family.run(pipe, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ours = str(Path(sgl_diffusion_accel.__file__).parent)
    assert [warning for warning in seen if warning.filename.startswith(ours)] == []
    assert torch.equal(output, expected)
    call = prof.report.last
    assert call.clock == "events of cuda:0"
    assert call.total_ms >= sum(call.denoise_steps_ms) > 0
    assert call.memory[-1].peak_allocated_mb > 0
