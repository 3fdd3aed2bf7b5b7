"""Applied before or after anything else that is done to a pipeline, the patch gives the same result."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch

from invariants import CACHES, NEVER_SKIPPING, Apply, Snapshot, assert_same, cross, families, family_params
from invariants.families import present
from sgl_diffusion_accel import AccelError, UnsupportedModelError
from sgl_diffusion_accel.targets import unwrap
from zoo import Family

REUSE = CACHES["reuse"]
CPU = torch.device("cpu")

Step = Callable[[Any], Any]


def sequential_offload(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)


def model_offload(pipe: Any) -> None:
    _, pipe.kept_hook = accelerate.cpu_offload_with_hook(pipe.transformer, execution_device=CPU)


def group_offload(pipe: Any, **how: Any) -> None:
    try:
        pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **how)
    except AttributeError:
        if torch.accelerator.current_accelerator() is None and diffusers.__version__ < "0.42":
            pytest.skip(f"group offloading of diffusers {diffusers.__version__} needs an accelerator")
        raise


def block_offload(pipe: Any) -> None:
    group_offload(pipe, offload_type="block_level", num_blocks_per_group=2)


def leaf_offload(pipe: Any) -> None:
    group_offload(pipe, offload_type="leaf_level")


def adapter(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def bfloat16(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


def fused(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


STEPS: dict[str, Step] = {
    f.__name__: f
    for f in (
        sequential_offload,
        model_offload,
        block_offload,
        leaf_offload,
        adapter,
        layerwise_casting,
        bfloat16,
        fused,
    )
}


def run(family: Family, pipe: Any) -> torch.Tensor:
    """A short run in the transformer's dtype."""
    given = family.call(pipe, steps=4)
    dtype = pipe.transformer.dtype
    floats = {k: v.to(dtype) for k, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return family.run(pipe, steps=4, **floats)


CASES = [
    *(("wan", step, "taylor") for step in STEPS),
    *(("wan", step, "gap control") for step in STEPS),
    *(("flux", step, "taylor") for step in ("block_offload", "adapter", "bfloat16")),
    *(("wan", step, "teacache") for step in ("sequential_offload", "leaf_offload", "layerwise_casting", "bfloat16")),
    *(("flux", step, "teacache") for step in STEPS if step != "model_offload"),
    *(("wan", step, "magcache, Taylor") for step in ("sequential_offload", "bfloat16")),
    *(("ltx", step, "teacache, Taylor") for step in ("sequential_offload", "leaf_offload", "bfloat16")),
]
"""LTX has blocks with parameters of their own, which its modulated input depends on."""


BY_DEFAULT = {
    *(("wan", step, "taylor") for step in STEPS),
    ("wan", "leaf_offload", "gap control"),
    ("flux", "adapter", "taylor"),
    ("flux", "leaf_offload", "teacache"),
    ("wan", "sequential_offload", "magcache, Taylor"),
    ("ltx", "leaf_offload", "teacache, Taylor"),
}
"""Each step with one cache, each cache with one step, and what TeaCache's signal reads of a model."""


@pytest.mark.parametrize(
    ("name", "step", "cache"),
    [pytest.param(*case, marks=[] if case in BY_DEFAULT else [pytest.mark.matrix]) for case in CASES],
)
def test_before_and_after(name: str, step: str, cache: str) -> None:
    family, do = present(name), STEPS[step]
    unpatched = family.make()
    do(unpatched)
    expected = run(family, unpatched)

    changes: list[Any] = []

    def patched(apply: Apply, first: bool) -> torch.Tensor:
        pipe = family.make()
        if not first:
            do(pipe)
        patch = apply(pipe)
        if first:
            do(pipe)
        outputs = [run(family, pipe) for _ in range(2 if first else 1)]
        assert torch.equal(outputs[0], outputs[-1])
        assert len(patch.stats.runs) == len(outputs)
        changes.append([branch.changes for branch in patch.stats.runs[-1].branches.values()])
        patch.remove()
        if first:
            assert torch.equal(run(family, pipe), expected)
        return outputs[0]

    exact = {"taylor": "threshold 0", "gap control": "gap control, tolerance 0"}
    never = NEVER_SKIPPING[exact.get(cache, "teacache, always over")]
    assert torch.equal(patched(never, True), expected)
    assert torch.equal(patched(never, False), expected)
    skipping = patched(CACHES[cache], True)
    assert not torch.equal(skipping, expected)
    assert torch.equal(skipping, patched(CACHES[cache], False))
    assert changes[0] == changes[1]
    assert changes[2] == changes[3]


def test_adapter_and_casting_change_the_output() -> None:
    """So that the comparisons above compare something."""
    family = present("wan")
    expected = run(family, family.make())
    for do in (adapter, layerwise_casting):
        pipe = family.make()
        do(pipe)
        assert not torch.equal(run(family, pipe), expected)


def test_offload_by_the_pipeline_after_applying() -> None:
    """The pipeline's own offloading replaces `forward` and takes hooks off after each run."""
    family = present("wan")
    expected = family.run(family.make())
    pipe = family.make()
    patch = NEVER_SKIPPING["threshold 0"](pipe)
    sequential_offload(pipe)
    for _ in range(2):
        assert torch.equal(family.run(pipe), expected)
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(family.run(pipe), expected)
    assert len(patch.stats.runs) == 3
    assert patch.stats.outside == 0


@families("wan", "flux")
def test_patch_under_offload_is_undone_exactly(family: Family) -> None:
    for step in (block_offload, adapter):
        pipe = family.make()
        step(pipe)
        family.run(pipe)
        before = Snapshot(pipe)
        with REUSE(pipe):
            family.run(pipe)
        assert_same(before, pipe)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@cross(
    "family, copied", family_params("wan", "wan22", matrix=["flux"]), {"deepcopy": copy.deepcopy, "pickled": pickled}
)
def test_copy_is_unpatched_and_original_stays(family: Family, copied: Callable[[Any], Any]) -> None:
    unpatched = family.make()
    expected = family.run(unpatched)
    pipe = family.make()
    patch = REUSE(pipe)
    cached = family.run(pipe)
    classes = [type(module) for module in unpatched.transformer.modules()]
    other = family.make()
    for name in family.transformers:
        setattr(other, name, copied(getattr(pipe, name)))
    assert type(pipe.transformer) is not classes[0]
    assert all(type(m) is cls for m, cls in zip(other.transformer.modules(), classes, strict=True))
    for module in (m for name in family.transformers for m in getattr(other, name).modules()):
        assert not [key for key in vars(module) if "accel" in key]
    assert torch.equal(family.run(other), expected)
    assert len(patch.stats.runs) == 1
    assert patch.active
    assert torch.equal(family.run(pipe), cached)
    with REUSE(other):
        assert torch.equal(family.run(other), cached)


def test_copy_of_the_pipeline_is_unpatched() -> None:
    family = present("wan")
    expected = family.run(family.make())
    pipe = family.make()
    REUSE(pipe)
    other = copy.deepcopy(pipe)
    assert torch.equal(family.run(other), expected)
    assert not torch.equal(family.run(pipe), expected)


@families("wan", "flux")
def test_saved_model_is_the_unpatched_one(family: Family, tmp_path: Path) -> None:
    unpatched = family.make()
    expected = family.run(unpatched)
    unpatched.transformer.save_pretrained(tmp_path / "unpatched")
    pipe = family.make()
    patch = REUSE(pipe)
    pipe.transformer.save_pretrained(tmp_path / "patched")
    for file in sorted((tmp_path / "unpatched").iterdir()):
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()
    other = family.make(seed=1)
    other.transformer = type(unpatched.transformer).from_pretrained(tmp_path / "patched")
    # weights from a file lie otherwise in memory, and the last bits of a matrix product depend on that
    torch.testing.assert_close(family.run(other), expected, rtol=0, atol=1e-3)
    assert not torch.allclose(family.run(pipe), expected, rtol=0, atol=1e-2)
    assert patch.active


@families("wan", "flux", "hunyuan")
def test_names_of_parameters_and_modules_stay(family: Family) -> None:
    pipe = family.make()
    transformer = pipe.transformer
    before = [list(transformer.state_dict()), list(dict(transformer.named_modules())), repr(transformer)]
    state = {key: value.clone() for key, value in transformer.state_dict().items()}
    with REUSE(pipe):
        assert [list(transformer.state_dict()), list(dict(transformer.named_modules())), repr(transformer)] == before
        transformer.load_state_dict(state)
        assert isinstance(transformer, getattr(diffusers, before[2].split("(")[0]))


def test_from_pipe_before_and_after() -> None:
    """A pipeline of another class that takes over the transformer, before or after it was patched."""
    family, image = present("flux"), present("flux_img2img")
    donor = image.make()
    alone = image.make()
    REUSE(alone)
    expected = image.run(alone)

    def taken_over(pipe: Any) -> Any:
        other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe, vae=donor.vae, scheduler=donor.scheduler)
        other.set_progress_bar_config(disable=True)
        assert other.transformer is pipe.transformer
        return other

    before = family.make()
    first = taken_over(before)
    patch = REUSE(before)
    assert torch.equal(image.run(first), expected)
    second = taken_over(before)
    assert torch.equal(image.run(second), expected)
    assert len(patch.stats.runs) == 2


@families("wan", "flux")
def test_diffusers_own_cache_is_refused(family: Family) -> None:
    config = diffusers.FirstBlockCacheConfig(threshold=0.1)
    pipe = family.make()
    pipe.transformer.enable_cache(config)
    with pytest.raises(UnsupportedModelError, match="disable_cache"):
        REUSE(pipe)
    pipe.transformer.disable_cache()
    patch = REUSE(pipe)
    cached = family.run(pipe)
    with pytest.raises(AccelError, match="remove"):
        pipe.transformer.enable_cache(config)
    assert torch.equal(family.run(pipe), cached)
    patch.remove()
    pipe.transformer.enable_cache(config)
    assert pipe.transformer.is_cache_enabled


def test_compiled_wrapper_is_patched_inside() -> None:
    family = present("wan")
    pipe = family.make()
    inner = pipe.transformer
    pipe.transformer = torch.compile(inner, backend="eager")
    patch = NEVER_SKIPPING["threshold 0"](pipe)
    assert unwrap(pipe.transformer) is inner
    patch.remove()
    assert type(inner) is diffusers.WanTransformer3DModel
