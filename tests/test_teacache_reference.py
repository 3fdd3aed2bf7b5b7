"""TeaCache, written down a second time in NumPy and with plain hooks: same decisions, same output.

The signals are seen from outside, always on a transformer without a cache: the time embedding by a hook on the module
that embeds, the modulated input by a hook on the first block's norm or attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from invariants import FixedPath, chosen, cross, families, family_params
from invariants.families import few_blocks, present
from sgl_diffusion_accel import CachePatch, apply_teacache
from sgl_diffusion_accel.caching.teacache.teacache_models import VARIANTS
from zoo import Family
from zoo.base import build, flow_euler, normal

TOTAL = 20
LINEAR = [0, 0, 0, 1, 0]


# Where the signals can be seen

Keep = Callable[[torch.Tensor], None]
Source = Callable[[Any, Keep], Any]


def output_of(path: str, index: int | None = None) -> Source:
    """What a part of the transformer returns, or one of the things that it returns."""

    def listen(transformer: Any, keep: Keep) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            keep(output if index is None else output[index])

        return transformer.get_submodule(path).register_forward_hook(hook)

    return listen


def input_of(path: str) -> Source:
    """What a part of the transformer takes."""

    def listen(transformer: Any, keep: Keep) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            keep(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return transformer.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    return listen


TEMB, TIMESTEP_PROJ = output_of("condition_embedder", 0), output_of("condition_embedder", 1)
MODULATED = {
    "flux": output_of("transformer_blocks.0.norm1", 0),
    "hunyuan": output_of("transformer_blocks.0.norm1", 0),
    "hunyuan15": output_of("transformer_blocks.0.norm1", 0),
    "sd3": output_of("transformer_blocks.0.norm1", 0),
    "mochi": output_of("transformer_blocks.0.norm1", 0),
    "ltx": input_of("transformer_blocks.0.attn1"),
    "qwen": input_of("transformer_blocks.0.attn"),
    "zimage": input_of("layers.0.attention"),
    "lumina2": input_of("layers.0.attn"),
}

Signals = list[tuple[int, str, np.ndarray]]
"""Of one branch: step, component, signal."""


@dataclass
class Where:
    """The place of a transformer call in a run: the step, and which call of the step it is."""

    step: int = 0
    calls: int = 0
    kept: dict[int, list[tuple[int, str, Any]]] = field(default_factory=dict)

    def keep(self, component: str, seen: Any) -> None:
        """Keeps something of the call that is under way, one list for each branch."""
        self.kept.setdefault(self.calls, []).append((self.step, component, seen))
        self.calls += 1


@contextmanager
def placed(pipe: Any) -> Iterator[Where]:
    """Counts the steps of a run by the scheduler's."""
    where, original = Where(), pipe.scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        where.step, where.calls = where.step + 1, 0
        return original(*args, **kwargs)

    pipe.scheduler.step = step
    try:
        yield where
    finally:
        del pipe.scheduler.step


def array(seen: torch.Tensor) -> np.ndarray:
    return seen.detach().numpy().astype(np.float64)


def unpatched_signals(family: Family, pipe: Any, source: Source, **kw: Any) -> list[Signals]:
    """The signals of a run of a pipeline without a cache, one list for each branch."""
    with placed(pipe) as where:
        hooks = [
            source(getattr(pipe, name), lambda seen, name=name: where.keep(name, array(seen)))
            for name in family.transformers
        ]
        family.run(pipe, **kw)
    for hook in hooks:
        hook.remove()
    return list(where.kept.values())


def replayed_signals(family: Family, pipe: Any, twin: Any, source: Source, **kw: Any) -> list[Signals]:
    """The signals that a cached run leads to: what it gives its transformer is given to that of a twin once more."""
    with placed(pipe) as where:

        def note(module: Any, args: Any, kwargs: Any) -> None:
            where.keep("transformer", (copied(args), copied(kwargs)))

        hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        family.run(pipe, **kw)
        hook.remove()
    seen: list[np.ndarray] = []
    hook = source(twin.transformer, lambda signal: seen.append(array(signal)))
    branches = []
    for calls in where.kept.values():
        for _, _, (args, kwargs) in calls:
            with torch.no_grad():
                twin.transformer(*args, **kwargs)
        branches.append([(step, name, signal) for (step, name, _), signal in zip(calls, seen, strict=True)])
        seen.clear()
    hook.remove()
    return branches


def copied(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.clone()
    if isinstance(given, dict):
        return {key: copied(value) for key, value in given.items()}
    return type(given)(map(copied, given)) if isinstance(given, (list, tuple)) else given


# TeaCache


@dataclass
class Decided:
    """What the reference says of one branch: whether to compute each step, and the change where one is measured."""

    computed: list[bool] = field(default_factory=list)
    changes: list[float | None] = field(default_factory=list)


def decided(
    signals: Signals, settings: dict[str, tuple[list[float], float]], window: tuple[int, int], least: float = 0.0
) -> Decided:
    """TeaCache on one branch.

    Args:
        signals: Of each step.
        settings: Coefficients and threshold by component.
        window: First step that may be skipped, and the first that may not be any more.
        least: What the estimate for a step is at least.
    """
    result, accumulated = Decided(), 0.0
    previous: dict[str, np.ndarray] = {}
    for step, component, signal in signals:
        before, change = previous.get(component), None
        previous[component] = signal
        if before is not None and before.shape == signal.shape and window[0] <= step < window[1]:
            coefficients, threshold = settings[component]
            change = np.abs(signal - before).mean() / np.abs(before).mean()
            accumulated += max(np.polyval(coefficients, change), least)
            compute = accumulated >= threshold
        else:
            compute = True
        accumulated = 0.0 if compute else accumulated
        result.computed.append(bool(compute))
        result.changes.append(change)
    return result


def check(patch: CachePatch, branches: list[Signals], settings: Any, window: tuple[int, int]) -> list[bool]:
    """Asserts that the last run decided as the reference does, step by step and branch by branch.

    Returns:
        What was decided at the steps where a change was measured.
    """
    run = patch.stats.runs[-1]
    assert len(run.branches) == len(branches)
    free = []
    for (name, branch), signals in zip(run.branches.items(), branches, strict=True):
        expected = decided(signals, settings, window)
        assert list(branch.computed) == expected.computed, name
        assert [change is None for change in branch.changes] == [change is None for change in expected.changes]
        measured = [change for change in branch.changes if change is not None]
        np.testing.assert_allclose(measured, [c for c in expected.changes if c is not None], rtol=2e-4)
        free += [flag for flag, change in zip(expected.computed, expected.changes, strict=True) if change is not None]
    return free


def check_both_happen(free: list[bool]) -> None:
    """Asserts that the comparisons have compared something."""
    assert True in free
    assert False in free


WINDOWS = {
    (None, None): (1, 19),
    (0, 20): (1, 19),
    (5, -1): (5, 19),
    (-15, 12): (5, 12),
    (0.25, 0.9): (5, 18),
    (0.0, 1.0): (1, 19),
    (3, 0.5): (3, 10),
}
"""`start_skipping` and `end_skipping`, to the steps of a run of `TOTAL` that may be skipped."""

# The time embedding, known beforehand

POLYNOMIALS = {
    "linear": LINEAR,
    "all degrees": [3000.0, -40.0, 1.5, 0.5, 0.001],
}


@families("wan", "cogvideox")
def test_time_embedding_is_followed_in_every_window(family: Family) -> None:
    pipe = few_blocks(family)
    source = output_of("time_embedding") if family.name == "cogvideox" else TEMB
    signals = unpatched_signals(family, pipe, source, steps=TOTAL)
    free = []
    for (start, end), window in WINDOWS.items():
        with apply_teacache(pipe, 0.035, coefficients=LINEAR, start_skipping=start, end_skipping=end) as patch:
            family.run(pipe, steps=TOTAL)
            free += check(patch, signals, {"transformer": (LINEAR, 0.035)}, window)
    check_both_happen(free)


@pytest.mark.parametrize("coefficients", POLYNOMIALS.values(), ids=POLYNOMIALS)
@pytest.mark.parametrize("retains", [False, True])
def test_both_signals_of_wan(retains: bool, coefficients: list[float]) -> None:
    family = present("wan")
    pipe = few_blocks(family)
    signals = unpatched_signals(family, pipe, TIMESTEP_PROJ if retains else TEMB, steps=TOTAL)
    other = unpatched_signals(family, pipe, TEMB if retains else TIMESTEP_PROJ, steps=TOTAL)
    free = []
    for threshold in (0.03, 0.06, 0.1):
        with apply_teacache(pipe, threshold, coefficients=coefficients, use_ret_steps=retains) as patch:
            family.run(pipe, steps=TOTAL)
            settings, window = {"transformer": (coefficients, threshold)}, (5 if retains else 1, 19)
            free += check(patch, signals, settings, window)
            changes = [change for change in patch.stats.runs[-1].branches["cond"].changes if change is not None]
            mistaken = decided(other[0], settings, window).changes
            assert not np.allclose(changes, [change for change in mistaken if change is not None], rtol=1e-2)
    check_both_happen(free)


@pytest.mark.parametrize("retains", [False, True])
def test_negative_estimates_count_as_nothing(retains: bool) -> None:
    family = present("wan")
    pipe = few_blocks(family)
    signals = unpatched_signals(family, pipe, TIMESTEP_PROJ if retains else TEMB, steps=TOTAL)
    window = (5 if retains else 1, 19)
    changes = [c for c in decided(signals[0], {"transformer": (LINEAR, 1.0)}, window).changes if c is not None]
    coefficients = [0, 0, 0, 1, -float(np.median(changes))]  # so that half of the estimates are below 0
    would_differ = False
    for share in (0.5, 1.0, 2.0):
        settings = {"transformer": (coefficients, share * float(np.std(changes)))}
        with apply_teacache(
            pipe, settings["transformer"][1], coefficients=coefficients, use_ret_steps=retains
        ) as patch:
            family.run(pipe, steps=TOTAL)
            check_both_happen(check(patch, signals, settings, window))
        unlimited = decided(signals[0], settings, window, least=-np.inf)
        would_differ |= unlimited.computed != decided(signals[0], settings, window).computed
    assert would_differ, "so that the comparison would show it"


@pytest.mark.parametrize("retains", [False, True])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("wan")])
def test_published_coefficients(variant: str, retains: bool) -> None:
    """With the published polynomials the model is another one, but the arithmetic is the same."""
    family = present("wan")
    pipe = few_blocks(family)
    published = VARIANTS[variant].retained if retains else VARIANTS[variant].fit
    assert published is not None
    signals = unpatched_signals(family, pipe, TIMESTEP_PROJ if retains else TEMB, steps=30, guidance=1)
    for speedup, threshold in published.thresholds.items():
        with apply_teacache(pipe, f"{speedup}x", use_ret_steps=retains, variant=variant) as patch:
            family.run(pipe, steps=30, guidance=1)
            settings = {"transformer": (list(published.coefficients), threshold)}
            check(patch, signals, settings, (5 if retains else 1, 29))


@families("wan", "cogvideox")
@pytest.mark.parametrize("guidance", [None, 1.0])
def test_fifty_steps_with_and_without_guidance(family: Family, guidance: float | None) -> None:
    pipe = few_blocks(family)
    source = TEMB if family.name == "wan" else output_of("time_embedding")
    signals = unpatched_signals(family, pipe, source, steps=50, guidance=guidance)
    assert len(signals) == (2 if family.name == "wan" and guidance is None else 1)
    with apply_teacache(pipe, 0.016, coefficients=LINEAR) as patch:
        family.run(pipe, steps=50, guidance=guidance)
        check_both_happen(check(patch, signals, {"transformer": (LINEAR, 0.016)}, (1, 49)))


@pytest.mark.parametrize("retains", [False, True])
def test_two_experts_with_settings_of_their_own(retains: bool) -> None:
    """The signal of the second starts with its own first step, and the window counts the steps of both."""
    family = present("wan22")
    pipe = few_blocks(family)
    signals = unpatched_signals(family, pipe, TIMESTEP_PROJ if retains else TEMB, steps=TOTAL)
    assert {component for _, component, _ in signals[0]} == {"transformer", "transformer_2"}
    quadratic = [0, 0, 20, 1, 0]
    for own in ({"teacache_thresh": 0.05}, {"coefficients": quadratic}, {"teacache_thresh": 0.02}):
        with apply_teacache(
            pipe, 0.03, coefficients=LINEAR, start_skipping=2, end_skipping=17, use_ret_steps=retains, secondary=own
        ) as patch:
            family.run(pipe, steps=TOTAL)
            settings = {
                "transformer": (LINEAR, 0.03),
                "transformer_2": (own.get("coefficients", LINEAR), own.get("teacache_thresh", 0.03)),
            }
            check_both_happen(check(patch, signals, settings, (2, 17)))


# Models outside of the zoo, in a loop of the plainest kind


class Loop(DiffusionPipeline):
    """Calls its transformer with the same conditioning at every step."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, steps: int, name: str, latents: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=steps) as progress_bar:
            for t in timesteps:
                output = self.transformer(latents, **{name: t.expand(len(latents))}, **given, return_dict=False)[0]
                latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
                progress_bar.update()
        return latents


def block_temb(transformer: Any, keep: Keep) -> Any:
    """The embedding that the first block is modulated by."""
    block = transformer.transformer_blocks[0]
    return block.register_forward_pre_hook(lambda module, args, kwargs: keep(kwargs["temb"]), with_kwargs=True)


VIDEO_SIZE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 7,
    "use_rotary_positional_embeddings": True,
}
ROTARY = (torch.ones(32, 16), torch.zeros(32, 16))
VIDEO_CALL = {"latents": (1, 2, 4, 8, 8), "encoder_hidden_states": (1, 7, 24)}
OUTSIDE: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], str, Source]] = {
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [24, 24],
            "text_emb_dim": 20,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2, 3],
        },
        {
            "latents": (1, 4, 8, 8),
            "encoder_hidden_states_t5": (1, 5, 24),
            "encoder_hidden_states_llama3": (4, 1, 5, 24),
            "pooled_embeds": (1, 20),
        },
        "timesteps",
        output_of("t_embedder"),
    ),
    "consisid": ("ConsisIDTransformer3DModel", VIDEO_SIZE, VIDEO_CALL, "timestep", block_temb),
    "cogvideox, with an offset embedding": (
        "CogVideoXTransformer3DModel",
        {**VIDEO_SIZE, "ofs_embed_dim": 16},
        VIDEO_CALL,
        "timestep",
        block_temb,
    ),
}


@pytest.mark.parametrize(("cls", "config", "shapes", "name", "source"), OUTSIDE.values(), ids=OUTSIDE)
def test_time_embedding_of_models_outside_the_zoo(
    cls: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], name: str, source: Source
) -> None:
    if not hasattr(diffusers, cls):
        pytest.skip(f"this diffusers has no {cls}")
    pipe = Loop(build(cls, 0, **config), flow_euler())
    given: dict[str, Any] = {key: normal(*shape, seed=0, key=key) for key, shape in shapes.items()}
    if "use_rotary_positional_embeddings" in config:
        given["image_rotary_emb"] = ROTARY
    if "ofs_embed_dim" in config:
        given["ofs"] = torch.full((1,), 2.0)
    seen: Signals = []
    hook = source(pipe.transformer, lambda signal: seen.append((len(seen), "transformer", array(signal))))
    unpatched = pipe(TOTAL, name, **given)
    hook.remove()
    assert len(seen) == TOTAL
    free = []
    for threshold in (0.02, 0.05):
        with apply_teacache(pipe, threshold, coefficients=LINEAR, start_skipping=3, end_skipping=0.9) as patch:
            assert not torch.equal(pipe(TOTAL, name, **given), unpatched)
            free += check(patch, [seen], {"transformer": (LINEAR, threshold)}, (3, 18))
    check_both_happen(free)
    assert torch.equal(pipe(TOTAL, name, **given), unpatched)


# The modulated input, on a path that does not depend on what is skipped


@families("flux", "hunyuan", "zimage", "ltx", matrix=["qwen", "mochi"])
def test_modulated_input_is_followed_on_a_fixed_path(family: Family) -> None:
    pipe = few_blocks(family, scheduler=FixedPath())
    signals = unpatched_signals(family, pipe, MODULATED[family.name], steps=TOTAL)
    changes = decided(signals[0], {"transformer": (LINEAR, 1.0)}, (1, TOTAL - 1)).changes
    typical = float(np.median([change for change in changes if change is not None]))
    free = []
    for threshold in (1.5 * typical, 4 * typical):
        for start, end in ((None, None), (-15, 12)):
            with apply_teacache(pipe, threshold, coefficients=LINEAR, start_skipping=start, end_skipping=end) as patch:
                family.run(pipe, steps=TOTAL)
                free += check(patch, signals, {"transformer": (LINEAR, threshold)}, WINDOWS[start, end])
    check_both_happen(free)


# The modulated input, wherever the cached run has gone

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "one branch": ("flux", {}, 1),
    "true guidance, flux": ("flux", {"guidance": 3.0}, 2),
    "true guidance, qwen": ("qwen", {}, 2),
    "true guidance off, qwen": ("qwen", {"guidance": 1.0}, 1),
    "true guidance, hunyuan": ("hunyuan", {"guidance": 3.0}, 2),
    "batched guidance, ltx": ("ltx", {}, 1),
    "batched guidance, mochi": ("mochi", {}, 1),
    "batched guidance, sd3": ("sd3", {}, 1),
    "batched guidance, zimage": ("zimage", {}, 1),
    "guidance off, ltx": ("ltx", {"guidance": 1.0}, 1),
    "guidance by two calls": ("lumina2", {}, 2),
    "guidance that ends, by two calls": ("lumina2", {"cfg_trunc_ratio": 0.5}, 2),
    "guidance that ends, batched": ("zimage", {"cfg_truncation": 0.5}, 1),
}


BY_DEFAULT = (
    "one branch",
    "true guidance, qwen",
    "batched guidance, ltx",
    "guidance by two calls",
    "guidance that ends, by two calls",
    "guidance that ends, batched",
)


@pytest.mark.parametrize(
    ("name", "kw", "branches"), chosen([pytest.param(*case, id=name) for name, case in CASES.items()], *BY_DEFAULT)
)
def test_modulated_input_is_followed_where_the_cached_run_goes(name: str, kw: dict[str, Any], branches: int) -> None:
    family = present(name)
    if name == "flux" and "guidance" in kw and family.other_guidance is None:
        pytest.skip("this diffusers has no true guidance for FLUX by embeddings")
    pipe, twin, free = few_blocks(family), few_blocks(family), []
    for threshold in (0.06, 0.12):
        with apply_teacache(pipe, threshold, coefficients=LINEAR, start_skipping=2, end_skipping=-2) as patch:
            signals = replayed_signals(family, pipe, twin, MODULATED[name], steps=14, **kw)
            assert len(signals) == branches
            free += check(patch, signals, {"transformer": (LINEAR, threshold)}, (2, 12))
    check_both_happen(free)


def test_a_batch_that_shrinks_has_nothing_to_be_compared_with() -> None:
    """Guidance that ends, in one batched call: that step is computed, and its signal is the next one's reference."""
    family = present("zimage")
    pipe, twin = few_blocks(family), few_blocks(family)
    with apply_teacache(pipe, 0.06, coefficients=LINEAR) as patch:
        (signals,) = replayed_signals(family, pipe, twin, MODULATED["zimage"], steps=TOTAL, cfg_truncation=0.2)
        sizes = [signal.shape[0] for _, _, signal in signals]
        switch = sizes.index(1)
        assert sizes == [2] * switch + [1] * (TOTAL - switch)
        assert 3 < switch < TOTAL - 6
        check(patch, [signals], {"transformer": (LINEAR, 0.06)}, (1, TOTAL - 1))
        (branch,) = patch.stats.runs[-1].branches.values()
        check_both_happen(list(branch.computed[switch + 1 : -1]))
        assert branch.reasons[switch] == "nothing to reuse"
        assert branch.changes[switch + 1] is not None


def test_three_branches() -> None:
    """HunyuanVideo 1.5 with a guider of three predictions, the third of which starts a step later."""
    family = present("hunyuan15")
    if not hasattr(diffusers, "SkipLayerGuidance"):
        pytest.skip("this diffusers has no SkipLayerGuidance")

    class Third(diffusers.SkipLayerGuidance):  # type: ignore[misc]
        """Asks for a third prediction, from all layers."""

        def prepare_models(self, denoiser: Any) -> None:
            self._count_prepared += 1

        def cleanup_models(self, denoiser: Any) -> None:
            pass

    pipe, twin = few_blocks(family), few_blocks(family)
    pipe.guider = Third(
        guidance_scale=4.0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=diffusers.LayerSkipConfig(indices=[2], fqn="transformer_blocks"),
    )
    with apply_teacache(pipe, 0.05, coefficients=LINEAR) as patch:
        signals = replayed_signals(family, pipe, twin, MODULATED["hunyuan15"], steps=TOTAL)
        assert [len(branch) for branch in signals] == [TOTAL, TOTAL, TOTAL - 1]
        check_both_happen(check(patch, signals, {"transformer": (LINEAR, 0.05)}, (1, TOTAL - 1)))


# What a skipped step gives

PATTERN = [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1]
FIXED: dict[str, Any] = {"teacache_thresh": 0.25, "coefficients": [0, 0, 0, 0, 0.1]}


class AllBlocks:
    """All blocks run at every step; at a skipped one each list returns its input plus what it added last.

    Args:
        lists: Block lists.
        streams: Names of the arguments that the outputs of a block continue.
        branches: Transformer calls of a step.
        order: Of the prediction, 0 or 1.
    """

    def __init__(self, lists: list[Any], streams: tuple[str, ...], branches: int, order: int) -> None:
        self.streams, self.branches, self.order, self.calls = streams, branches, order, -1
        self.inputs: dict[int, list[torch.Tensor]] = {}
        self.kept: dict[tuple[int, int], list[tuple[int, list[torch.Tensor]]]] = {}
        for index, blocks in enumerate(lists):
            blocks[0].register_forward_pre_hook(functools.partial(self.enter, index), with_kwargs=True)
            blocks[-1].register_forward_hook(functools.partial(self.leave, index))

    def enter(self, index: int, module: Any, args: Any, kwargs: Any) -> None:
        self.calls += index == 0
        self.inputs[index] = [kwargs[s] if s in kwargs else args[i] for i, s in enumerate(self.streams)]

    def leave(self, index: int, module: Any, args: Any, output: Any) -> Any:
        step, branch = divmod(self.calls, self.branches)
        kept, inputs = self.kept.setdefault((index, branch), []), self.inputs[index]
        if PATTERN[step]:
            outputs = output if isinstance(output, tuple) else (output,)
            kept.append((step, [after - before for after, before in zip(outputs, inputs, strict=True)]))
            return None
        newest, added = kept[-1]
        if self.order and len(kept) > 1:
            older, other = kept[-2]
            k = (step - newest) / (newest - older)
            added = [a + k * (a - b) for a, b in zip(added, other, strict=True)]
        told = tuple(before + residual for before, residual in zip(inputs, added, strict=True))
        return told if isinstance(output, tuple) else told[0]


STREAMS = {
    "wan": ("hidden_states",),
    "cogvideox": ("hidden_states", "encoder_hidden_states"),
    "flux": ("encoder_hidden_states", "hidden_states"),
    "hunyuan": ("hidden_states", "encoder_hidden_states"),
    "qwen": ("encoder_hidden_states", "hidden_states"),
    "zimage": ("x",),
}


@cross("family, order", family_params("wan", "cogvideox", "flux", "zimage", matrix=STREAMS), [1, 0])
def test_skipped_step_adds_what_the_blocks_added_last(family: Family, order: int) -> None:
    plain = family.make()
    unpatched = family.run(plain, steps=len(PATTERN))
    lists = [getattr(plain.transformer, name) for name in family.block_lists]
    AllBlocks(lists, STREAMS[family.name], len(family.branches), order)
    expected = family.run(plain, steps=len(PATTERN))
    assert not torch.allclose(expected, unpatched, atol=1e-2)

    pipe = family.make()
    patch = apply_teacache(pipe, **FIXED, taylorseer_order=order)
    torch.testing.assert_close(family.run(pipe, steps=len(PATTERN)), expected, rtol=0, atol=1e-5)
    for branch in patch.stats.runs[-1].branches.values():
        assert branch.computed == tuple(map(bool, PATTERN))
