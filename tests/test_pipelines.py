"""Every pipeline class of diffusers with a diffusion transformer: what the library does with it is what
`pipelines/verdicts.json` says.

Some by default, one of each kind of loop at least; all of them in the long matrix.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks import models
from invariants.matrix import chosen
from pipelines import CASES, Case, checks
from pipelines.finding import found
from pipelines.left_out import LEFT_OUT
from pipelines.rows import ALL
from pipelines.trace import Trace, recording
from pipelines.verdict import FILE, kept, verdict_of
from sgl_diffusion_accel import apply_adaptive_cache
from sgl_diffusion_accel.caching.cache_handler import CacheHandler
from sgl_diffusion_accel.loop import conversions
from sgl_diffusion_accel.loop.runs import Run

torch.set_num_threads(1)

USUAL = (
    "AllegroPipeline",
    "AnyFlowPipeline",
    "AuraFlowPipeline",
    "BriaFibo2Pipeline",
    "BriaFiboPipeline",
    "BriaPipeline",
    "ChromaImg2ImgPipeline",
    "ChromaInpaintPipeline",
    "ChronoEditPipeline",
    "CogVideoXFunControlPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "CogView4ControlPipeline",
    "ConsisIDPipeline",
    "Cosmos2TextToImagePipeline",
    "CosmosTextToWorldPipeline",
    "DiTPipeline",
    "EasyAnimatePipeline",
    "ErnieImagePipeline",
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline, with a picture",
    "FluxControlNetPipeline, in a window",
    "FluxControlPipeline",
    "FluxFillPipeline",
    "FluxImg2ImgPipeline, strength 0.6",
    "FluxInpaintPipeline",
    "FluxKontextPipeline",
    "GlmImagePipeline",
    "HiDreamImagePipeline",
    "HunyuanDiTPAGPipeline",
    "HunyuanImagePipeline",
    "HunyuanVideoFramepackPipeline, from the end",
    "HunyuanVideoImageToVideoPipeline, image in the first frame",
    "Ideogram4Pipeline",
    "Kandinsky5I2IPipeline",
    "Krea2Pipeline",
    "LTX2Pipeline, three kinds of guidance",
    "LTXConditionPipeline",
    "LTXI2VLongMultiPromptPipeline, two windows",
    "LattePipeline",
    "Lumina2Pipeline, guidance cut short",
    "LuminaPipeline",
    "MochiPipeline",
    "PRXPixelPipeline",
    "PixArtSigmaPAGPipeline",
    "QwenImage21Pipeline",
    "QwenImageControlNetInpaintPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "SanaSprintPipeline",
    "SanaVideoPipeline",
    "SkyReelsV2DiffusionForcingPipeline, all frames at once",
    "SkyReelsV2DiffusionForcingPipeline, by turns",
    "StableAudioPipeline",
    "StableDiffusion3ControlNetPipeline",
    "StableDiffusion3InpaintPipeline",
    "StableDiffusion3PAGPipeline",
    "StableDiffusion3Pipeline, skip-layer guidance",
    "WanImageToVideoPipeline, two experts",
    "WanVACEPipeline",
    "WanVideoToVideoPipeline, strength 0.6",
    "ZImageImg2ImgPipeline",
)


@pytest.mark.parametrize("case", chosen(CASES, *USUAL))
def test_verdict_is_what_comes_out(case: Case) -> None:
    if case.missing:
        pytest.skip(case.missing)
    assert verdict_of(case) == kept()[case.key]


def test_every_class_of_diffusers_was_looked_at() -> None:
    """One that is named here is new. Give it a case in `tests/pipelines/rows`, and run `make models`."""
    new = sorted({*found()} - {case.name for case in CASES.values()} - {*LEFT_OUT})
    assert not new, f"{', '.join(new)} of diffusers: in no case of tests/pipelines, nobody has looked"


def test_search_finds_pipelines_with_a_transformer_and_no_others() -> None:
    assert {"FluxPipeline", "WanVACEPipeline", "KandinskyPriorPipeline"} <= {*found()}
    assert not {"StableDiffusionXLPipeline", "LTXLatentUpsamplePipeline"} & {*found()}


def test_every_case_has_a_verdict_and_every_class_one_answer() -> None:
    assert sorted(kept()) == sorted(CASES)
    assert len(CASES) == len(ALL), "two cases have one name"
    assert not {case.name for case in CASES.values()} & {*LEFT_OUT}
    assert len({case.name for case in CASES.values()}) >= 120


def test_page_counts_the_classes() -> None:
    read = json.loads(FILE.read_text(encoding="utf-8"))
    assert read["not run"] == LEFT_OUT
    names = {case.name for case in CASES.values()}
    assert f"{len(names) + len(LEFT_OUT)} pipeline classes" in models.pipelines_in_short(read)
    assert f"{len(names)} were run" in models.pipelines_in_short(read)


# That the checks can fail


def prepared(key: str = "FluxPipeline, true CFG") -> tuple[Case, Any, Trace, torch.Tensor]:
    case = CASES[key]
    if case.missing:
        pytest.skip(case.missing)
    pipe = case.make()
    with recording(pipe) as trace:
        unpatched = case.run(pipe)
    return case, pipe, trace, unpatched


def test_step_that_is_misplaced_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe, trace, unpatched = prepared()
    advance = Run.advance

    def one_behind(run: Run, module: Any, call: Any) -> tuple[int, str]:
        step, branch = advance(run, module, call)
        return max(step - 1, 0), branch

    monkeypatch.setattr(Run, "advance", one_behind)
    with pytest.raises(AssertionError, match="a call of step 1 is placed at step 0"):
        checks.never_skipping(case, pipe, trace, unpatched)


def test_branches_that_are_mixed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe, trace, unpatched = prepared()
    advance = Run.advance

    def exchanged(run: Run, module: Any, call: Any) -> tuple[int, str]:
        step, branch = advance(run, module, call)
        return step, {"cond": "uncond", "uncond": "cond"}[branch] if step == 3 else branch

    monkeypatch.setattr(Run, "advance", exchanged)
    with pytest.raises(AssertionError, match="one branch is called cond and, at step 3, uncond"):
        checks.never_skipping(case, pipe, trace, unpatched)


def test_nothing_skipped_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe, trace, unpatched = prepared()
    monkeypatch.setattr(CacheHandler, "enter", lambda *_: None)
    with pytest.raises(AssertionError, match="nobody is told"):
        checks.whole_calls(case, pipe, trace, unpatched)


def test_steps_are_counted_by_what_the_scheduler_does() -> None:
    _, _, trace, _ = prepared()
    assert trace.shape() == "8 steps, 2 calls each"
    assert [call.step for call in trace.calls] == [step for step in range(8) for _ in range(2)]
    assert Counter(trace.branches()) == dict.fromkeys(trace.branches(), 8)
    assert len(set(trace.branches())) == 2


# What was wrong once


def test_loop_that_leaves_the_last_timestep_off_has_one_step_less() -> None:
    case, pipe, trace, _ = prepared("LTXI2VLongMultiPromptPipeline, two windows")
    with apply_adaptive_cache(pipe, tolerance=0) as patch:
        case.run(pipe)
    assert len(pipe.scheduler.timesteps) == 8
    assert set(trace.lengths.values()) == {7} == {run.steps for run in patch.stats.runs}


def test_diffusion_forcing_is_placed_where_all_frames_are_at_one_step() -> None:
    case, pipe, _, _ = prepared("SkyReelsV2DiffusionForcingPipeline, all frames at once")
    with apply_adaptive_cache(pipe, tolerance=0) as patch:
        case.run(pipe)
    assert not patch.stats.unplaced
    case, pipe, trace, _ = prepared("SkyReelsV2DiffusionForcingPipeline, by turns")
    with apply_adaptive_cache(pipe, tolerance=0) as patch:
        case.run(pipe)
    assert patch.stats.outside == len(trace.calls)


@pytest.mark.parametrize("key", ["PRXPixelPipeline", "Cosmos2TextToImagePipeline"])
def test_weights_count_what_the_pipeline_makes_of_the_outputs(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe, trace, _ = prepared(key)
    assert checks.weights(case, pipe, trace) == checks.YES
    monkeypatch.setattr(conversions, "CONVERSIONS", {})
    with pytest.raises(AssertionError, match="the weight of an output is off by"):
        checks.weights(case, pipe, trace)
